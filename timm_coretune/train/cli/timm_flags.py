"""The flags that timm's train.py has, with its names, defaults and meanings

What differs is listed in docs/flags.md, which a test holds to this file.
"""

import argparse

from timm.utils import ParseKwargs


def add_timm_flags(parser: argparse.ArgumentParser) -> None:
    """Add them group by group."""
    _add_data(parser)
    _add_model(parser)
    _add_batch_norm_and_ema(parser)
    _add_device(parser)
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_augmentation(parser)
    _add_loss(parser)
    _add_scheduled_sizes(parser)
    _add_naflex(parser)
    _add_distillation(parser)
    _add_run(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    group.add_argument('data', nargs='?', metavar='DIR', help='data set (deprecated, use --data-dir)')
    add = group.add_argument
    add('--data-dir', metavar='DIR', help='folder of class folders, tar, or safetensors of images and labels')
    add('--dataset', default='', metavar='TYPE/NAME', help='timm data set such as torch/cifar10, hfds/owner/name')
    add('--train-split', default='train', metavar='NAME', help='split to train on (default: train)')
    add('--val-split', default='validation', metavar='NAME', help='split to validate on (default: validation)')
    add('--train-num-samples', type=int, metavar='N', help='training images, where a data set cannot tell')
    add('--val-num-samples', type=int, metavar='N', help='validation images, where a data set cannot tell')
    add('--dataset-download', action='store_true', help='download torch/ and tfds/ data sets')
    add('--class-map', default='', metavar='FILE', help='maps class names to indices')
    add('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB for 3 channels, else L)')
    add('--input-key', metavar='KEY', help='name of the image in a data set of records')
    add('--target-key', metavar='KEY', help='name of the label in a data set of records')
    add('--dataset-trust-remote-code', action='store_true', help='run code that a Hugging Face data set brings')


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet50', metavar='NAME', help='timm model (default: resnet50)')
    add('--pretrained', action='store_true', help="start from timm's pretrained weights of the model")
    add('--pretrained-path', metavar='FILE', help='start from this checkpoint of a self-supervised method')
    add('--initial-checkpoint', default='', metavar='FILE', help='the same, with the classifier if the file has one')
    add('--resume', default='', metavar='FILE', help='continue from a state of a run, auto: the newest intact one')
    add('--no-resume-opt', action='store_true', help='continue without the state of the optimizer')
    add('--num-classes', type=int, metavar='N', help='classes (default: as the data set has, else as the model has)')
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, catavgmax (default: as the model has)')
    add('--img-size', type=int, metavar='N', help='image size in pixels (default: as the model has)')
    add('--in-chans', type=int, metavar='N', help='image channels (default: 3)')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height, width (default: as the model has)')
    add('--crop-pct', type=float, metavar='R', help='share of a validation image that the center crop keeps')
    add('--mean', type=float, nargs='+', metavar='X', help='mean that images are normalised by')
    add('--std', type=float, nargs='+', metavar='X', help='standard deviation that images are normalised by')
    add('--interpolation', default='', metavar='NAME', help='interpolation of validation images')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='images a process and step (default: 128)')
    add('-vb', '--validation-batch-size', type=int, metavar='N', help='the same in validation (default: batch size)')
    add('--channels-last', action='store_true', help='channels_last memory layout')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches an update (default: 1)')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='passed on to the model')
    add('--head-init-scale', type=float, metavar='X', help='multiply the initial classifier by this')
    add('--head-init-bias', type=float, metavar='X', help='initial bias of the classifier')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile (inductor if empty)')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    add('--drop', type=float, default=0.0, metavar='P', help='dropout before the classifier (default: 0)')
    add('--drop-path', type=float, metavar='P', help='stochastic depth')
    add('--drop-block', type=float, metavar='P', help='DropBlock')
    add('--fast-norm', action='store_true', help='timm fast normalization layers under mixed precision')
    add('--torchscript', action='store_true', help='script the model (plain tuning only)')
    add('--fuser', default='', metavar='NAME', help='TorchScript fuser: te, old, nvfuser')
    add('--drop-connect', type=float, metavar='P', help='not supported: timm reads it nowhere, use --drop-path')


def _add_batch_norm_and_ema(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('BatchNorm and moving average of the weights').add_argument
    add('--bn-momentum', type=float, metavar='X', help='BatchNorm momentum')
    add('--bn-eps', type=float, metavar='X', help='BatchNorm epsilon')
    add('--sync-bn', action='store_true', help='BatchNorm over all processes')
    add('--dist-bn', default='reduce', help='BatchNorm statistics after an epoch: reduce, broadcast or "" for as is')
    add('--model-ema', action='store_true', help='keep, validate and publish a moving average of the weights')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU, and do not validate it')
    add('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay an update (default: 0.9998)')
    add('--model-ema-warmup', action='store_true', help='start with a lower decay')
    add('--split-bn', action='store_true', help='BatchNorm of its own for each augmentation split')


def _add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('device, beside the configuration of accelerate').add_argument
    add('--device', default='cuda', metavar='NAME', help='cpu keeps off accelerators; else accelerate decides')
    add('--amp', action='store_true', help='mixed precision, unless accelerate launch was given one')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='its dtype (default: float16)')
    add('--model-dtype', choices=('float32', 'float16', 'bfloat16'), help='dtype of the weights (default: float32)')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in every forward pass')
    add('--synchronize-step', action='store_true', help='wait for the device after every update')
    add('--local_rank', '--local-rank', type=int, default=0, metavar='N', help='set by accelerate launch')
    add('--device-modules', nargs='+', metavar='NAME', help='Python modules to import for further devices')
    add('-j', '--workers', type=int, default=4, metavar='N', help='loader processes a process (default: 4)')
    add('--pin-mem', action='store_true', help='page-locked memory for images')
    add('--no-prefetcher', action='store_true', help='normalise in the loader processes')
    add('--seed', type=int, default=42, metavar='N', help='random seed (default: 42)')
    add('--worker-seeding', default='all', choices=('all', 'part'), help='seeding of loader processes (default: all)')
    add('--use-multi-epochs-loader', action='store_true', help='keep loader processes running between epochs')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='sgd', metavar='NAME', help='timm optimizer (default: sgd, which is Nesterov)')
    add('--opt-eps', type=float, metavar='X', help='epsilon of the optimizer')
    add('--opt-betas', type=float, nargs='+', metavar='X', help='betas of the optimizer')
    add('--momentum', type=float, default=0.9, metavar='X', help='momentum (default: 0.9)')
    add('--weight-decay', type=float, default=2e-5, metavar='X', help='weight decay (default: 2e-5)')
    add('--clip-grad', type=float, metavar='X', help='clip gradients at this')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what is clipped (default: norm)')
    add('--layer-decay', type=float, metavar='X', help='learning rate factor from layer to layer, downwards')
    add('--layer-decay-min-scale', type=float, default=0, metavar='X', help='its least product (default: 0)')
    add('--layer-decay-no-opt-scale', type=float, metavar='X', help='freeze layers below this product')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='passed on to the optimizer')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('learning rate and its schedule').add_argument
    add('--lr', type=float, metavar='X', help='learning rate; without it --lr-base, scaled by the batch')
    add('--lr-base', type=float, default=0.1, metavar='X', help='learning rate at --lr-base-size (default: 0.1)')
    add('--lr-base-size', type=int, default=256, metavar='N', help='global batch of --lr-base (default: 256)')
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help='scaling (default: sqrt for Adam, LAMB)')
    add('--sched', default='cosine', metavar='NAME', help='timm scheduler (default: cosine)')
    add('--sched-on-updates', action='store_true', help='step it every update, not every epoch')
    add('--lr-noise', type=float, nargs='+', metavar='R', help='where learning rate noise starts and ends, 0 to 1')
    add('--lr-noise-pct', type=float, default=0.67, metavar='R', help='its limit (default: 0.67)')
    add('--lr-noise-std', type=float, default=1.0, metavar='X', help='its standard deviation (default: 1)')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='growth of cycles (default: 1)')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='learning rate factor a cycle (default: 0.5)')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='cycles (default: 1)')
    add('--lr-k-decay', type=float, default=1.0, metavar='X', help='k-decay of cosine and poly (default: 1)')
    add('--warmup-lr', type=float, default=1e-5, metavar='X', help='learning rate warm-up starts at (default: 1e-5)')
    add('--min-lr', type=float, default=0, metavar='X', help='least learning rate (default: 0)')
    add('--epochs', type=int, default=300, metavar='N', help='epochs (default: 300)')
    add('--epoch-repeats', type=float, default=0.0, metavar='X', help='repeats of an iterable data set an epoch')
    add('--start-epoch', type=int, metavar='N', help='epoch to start at, over that of --resume')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs of multistep')
    add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between decays (default: 90)')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up (default: 5)')
    add('--warmup-prefix', action='store_true', help='warm-up comes before the schedule, not out of it')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the least learning rate (default: 0)')
    add('--patience-epochs', type=int, default=10, metavar='N', help='patience of the plateau schedule (default: 10)')
    add(
        '--decay-rate', '--dr', type=float, default=0.1, metavar='X', help='learning rate factor a decay (default: 0.1)'
    )


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('augmentation and regularization').add_argument
    add('--no-aug', action='store_true', help='none of it')
    add('--train-crop-mode', metavar='MODE', help='how training images are cropped (default: random resized crop)')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='R', help='area of a crop (default: 0.08 1)')
    add('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='R', help='its aspect (default: 3/4 4/3)')
    add('--hflip', type=float, default=0.5, metavar='P', help='horizontal flip (default: 0.5)')
    add('--vflip', type=float, default=0.0, metavar='P', help='vertical flip (default: 0)')
    add('--color-jitter', type=float, default=0.4, metavar='X', help='color jitter (default: 0.4)')
    add('--color-jitter-prob', type=float, metavar='P', help='probability of any color jitter (default: always)')
    add('--grayscale-prob', type=float, metavar='P', help='conversion to grey')
    add('--gaussian-blur-prob', type=float, metavar='P', help='blur')
    add('--aa', metavar='POLICY', help='AutoAugment or RandAugment policy')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation over processes')
    add('--aug-splits', type=int, default=0, metavar='N', help='AugMix splits, 2 or more (default: 0, off)')
    add('--reprob', type=float, default=0.0, metavar='P', help='random erasing (default: 0)')
    add('--remode', default='pixel', metavar='MODE', help='its filling (default: pixel)')
    add('--recount', type=int, default=1, metavar='N', help='its areas (default: 1)')
    add('--resplit', action='store_true', help='no random erasing in the first augmentation split')
    add('--mixup', type=float, default=0.0, metavar='A', help='alpha of pixel mixup (default: 0, off)')
    add('--cutmix', type=float, default=0.0, metavar='A', help='alpha of CutMix (default: 0, off)')
    add('--cutmix-minmax', type=float, nargs='+', metavar='R', help='side of the cut, in place of alpha')
    add('--mixup-prob', type=float, default=1.0, metavar='P', help='probability of any of them (default: 1)')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='of CutMix when both are on (default: 0.5)')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem', 'half'), help='what shares one draw')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='stop mixing pixels at this epoch (default: never)')
    add('--smoothing', type=float, default=0.1, metavar='R', help='label smoothing (default: 0.1)')
    add('--train-interpolation', default='random', metavar='NAME', help='of training images (default: random)')


def _add_loss(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('losses of plain tuning').add_argument
    add('--jsd-loss', action='store_true', help='Jensen-Shannon divergence with cross-entropy, for --aug-splits')
    add('--bce-loss', action='store_true', help='binary cross-entropy')
    add('--bce-sum', action='store_true', help='sum it over the classes')
    add('--bce-target-thresh', type=float, metavar='X', help='make its targets 0 or 1 at this threshold')
    add('--bce-pos-weight', type=float, metavar='X', help='weight of its positives')


def _add_scheduled_sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('training sizes that change').add_argument
    add('--train-img-sizes', type=int, nargs='+', metavar='N', help='image sizes, one is drawn for each batch')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size at each (default: --batch-size)')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='probability of each (default: even)')
    add(
        '--train-size-schedule', default='constant', choices=('constant', 'progressive'),
        help='draw as given, or go from the first to the last over the epochs (default: constant)',
    )  # fmt: skip
    add('--train-size-schedule-spread', type=float, default=0.65, metavar='X', help='sizes around the current one')
    add('--train-size-random-mix', type=float, default=0.1, metavar='R', help='share of any size (default: 0.1)')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches an epoch')
    add(
        '--variable-batch-loss-scale', default='none', choices=('none', 'sqrt', 'linear'),
        help='scale the loss by batch size over the mean batch size (default: none)',
    )  # fmt: skip


def _add_naflex(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('NaFlex: images of any size as sequences of patches').add_argument
    add('--naflex-loader', action='store_true', help='train a NaFlex model on them')
    add(
        '--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], metavar='N',
        help='sequence lengths, one is drawn for each batch (default: 128 256 576 784 1024)',
    )  # fmt: skip
    add('--naflex-max-seq-len', type=int, default=576, metavar='N', help='length in validation (default: 576)')
    add('--naflex-patch-sizes', type=int, nargs='+', metavar='N', help='patch sizes (default: that of the model)')
    add('--naflex-patch-size-probs', type=float, nargs='+', metavar='P', help='probability of each (default: even)')
    add(
        '--naflex-loss-scale', default='linear', choices=('none', 'sqrt', 'linear'),
        help='scale the loss by batch size over --batch-size (default: linear)',
    )  # fmt: skip
    add('--naflex-patchify-channels-first', action='store_true', help='channels before pixels in a patch')


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('distillation, in plain tuning').add_argument
    add('--kd-model-name', metavar='NAME', help='timm model to learn from')
    add('--kd-distill-type', default='logit', choices=('logit', 'feature', 'token'), help='what of it (default: logit)')
    add('--kd-loss-type', default='kl', metavar='NAME', help='loss of logits (default: kl)')
    add('--distill-loss-weight', type=float, metavar='W', help='weight of the distillation loss')
    add('--task-loss-weight', type=float, metavar='W', help='weight of the loss of the labels')
    add('--kd-temperature', type=float, default=4.0, metavar='T', help='divides the logits (default: 4)')
    add('--kd-student-feature-dim', type=int, metavar='N', help='width of the features (default: as the model has)')
    add('--kd-teacher-feature-dim', type=int, metavar='N', help='width of those learnt from (default: as it has)')
    add(
        '--kd-token-distill-type', default='soft', choices=('soft', 'hard'),
        help='distributions, or classes, for the distillation token (default: soft)',
    )  # fmt: skip


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('run').add_argument
    add('--log-interval', type=int, default=50, metavar='N', help='updates between log lines (default: 50)')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations (default: 1)')
    add('--recovery-interval', type=int, default=0, metavar='N', help='updates between recovery checkpoints')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep (default: 10)')
    add('--output', default='', metavar='DIR', help='where runs are written (default: output/train)')
    add('--experiment', default='', metavar='NAME', help='name of the run (default: time, model and image size)')
    add('--eval-metric', default='top1', metavar='NAME', help='decides on the best: top1, top5, loss, or of --metrics')
    add('--save-images', action='store_true', help='write the batch of every log line as a picture')
    add('--tta', type=int, default=0, metavar='N', help='average N neighbouring outputs in validation (default: 0)')
    add('--log-wandb', action='store_true', help='log to Weights & Biases, as --log-with wandb')
    add('--wandb-project', metavar='NAME', help='its project')
    add('--wandb-tags', nargs='+', default=[], metavar='TAG', help='its tags')
    add('--wandb-resume-id', default='', metavar='ID', help='its run to continue, with --resume')
