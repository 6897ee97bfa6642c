"""Command line and YAML of train.py

Names, defaults and meanings are those of timm's train.py. Ours stand in the group of Core-tuning.
"""

import argparse
import os
from importlib import resources
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import yaml
from timm.utils import ParseKwargs

_SAMPLE_RECIPE = 'sample.yaml'


class ParsedArguments(NamedTuple):
    """The arguments of a run.

    Attributes:
        args: What argparse returned.
        text: The same as YAML, as written beside the weights.
        assumed: One sentence on what was not given and therefore assumed, or None.
    """

    args: argparse.Namespace
    text: str
    assumed: Optional[str]


def create_parser() -> argparse.ArgumentParser:
    """The parser of train.py, one function for each group of its help."""
    parser = argparse.ArgumentParser(
        prog='train.py',
        description='Fine-tune a pretrained timm model on labelled images, with --coretune by Core-tuning.',
        epilog='Without --data-dir and --dataset a bundled sample of Fashion-MNIST is used.',
    )
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file of defaults; flags win over it')
    _add_data(parser)
    _add_model(parser)
    _add_coretune(parser)
    _add_device(parser)
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_augmentation(parser)
    _add_run(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    parser.add_argument('data', nargs='?', metavar='DIR', help='data set (deprecated, use --data-dir)')
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
    add('--resume', default='', metavar='FILE', help='continue a run from its last.pth.tar')
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
    add('--bn-momentum', type=float, metavar='X', help='BatchNorm momentum')
    add('--bn-eps', type=float, metavar='X', help='BatchNorm epsilon')
    add('--sync-bn', action='store_true', help='BatchNorm over all processes')
    add('--dist-bn', default='reduce', help='BatchNorm statistics after an epoch: reduce, broadcast or "" for as is')
    add('--model-ema', action='store_true', help='keep, validate and publish a moving average of the weights')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU, and do not validate it')
    add('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay an update (default: 0.9998)')
    add('--model-ema-warmup', action='store_true', help='start with a lower decay')


def _add_coretune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Core-tuning').add_argument
    add('--coretune', action='store_true', help='Core-tuning; without it plain cross-entropy tuning')
    add(
        '--contrast-weight', type=float, default=0.1, metavar='W', help='weight of the contrast (default: 0.1), 0: none'
    )
    add('--coretune-alpha', type=float, default=1.0, metavar='A', help='mixtures by Beta(A, A), > 0 (default: 1)')
    add(
        '--coretune-min-positive-lam', type=float, default=0.0, metavar='R',
        help='least share of the hardest positive in its mixture, 0 to 1 (default: 0)',
    )  # fmt: skip
    add('--contrast-temperature', type=float, default=0.07, metavar='T', help='divides cosines, > 0 (default: 0.07)')
    add('--projection-dim', type=int, default=256, metavar='N', help='width of the contrasted embedding (default: 256)')
    add('--no-coretune-gather', action='store_true', help='mine and contrast within each process only')


def _add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('device, beside the configuration of accelerate').add_argument
    add('--amp', action='store_true', help='mixed precision, unless accelerate launch was given one')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='its dtype (default: float16)')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in every forward pass')
    add('-j', '--workers', type=int, default=4, metavar='N', help='loader processes a process (default: 4)')
    add('--pin-mem', action='store_true', help='page-locked memory for images')
    add('--no-prefetcher', action='store_true', help='normalise in the loader processes')
    add('--seed', type=int, default=42, metavar='N', help='random seed (default: 42)')
    add('--worker-seeding', default='all', metavar='MODE', help='how loader processes are seeded (default: all)')


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
    add('--reprob', type=float, default=0.0, metavar='P', help='random erasing (default: 0)')
    add('--remode', default='pixel', metavar='MODE', help='its filling (default: pixel)')
    add('--recount', type=int, default=1, metavar='N', help='its areas (default: 1)')
    add('--mixup', type=float, default=0.0, metavar='A', help='alpha of pixel mixup (default: 0, off)')
    add('--cutmix', type=float, default=0.0, metavar='A', help='alpha of CutMix (default: 0, off)')
    add('--cutmix-minmax', type=float, nargs='+', metavar='R', help='side of the cut, in place of alpha')
    add('--mixup-prob', type=float, default=1.0, metavar='P', help='probability of any of them (default: 1)')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='of CutMix when both are on (default: 0.5)')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares one draw')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='stop mixing pixels at this epoch (default: never)')
    add('--smoothing', type=float, default=0.1, metavar='R', help='label smoothing (default: 0.1)')
    add('--train-interpolation', default='random', metavar='NAME', help='of training images (default: random)')


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('run').add_argument
    add('--log-interval', type=int, default=50, metavar='N', help='updates between log lines (default: 50)')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations (default: 1)')
    add('--recovery-interval', type=int, default=0, metavar='N', help='updates between recovery checkpoints')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep (default: 10)')
    add('--output', default='', metavar='DIR', help='where runs are written (default: output/train)')
    add('--experiment', default='', metavar='NAME', help='name of the run (default: time, model and image size)')
    add('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'), help='decides on the best (default: top1)')


def _sample_recipe() -> Dict[str, Any]:
    """The recipe of the bundled sample, its paths made absolute."""
    assets = resources.files('timm_coretune') / 'assets'
    recipe = yaml.safe_load((assets / _SAMPLE_RECIPE).read_text())
    for key in ('data_dir', 'pretrained_path'):
        recipe[key] = str(assets / recipe[key])
    return recipe


def _read_config(path: str, parser: argparse.ArgumentParser) -> Dict[str, Any]:
    try:
        with open(path) as f:
            config = yaml.safe_load(f) or {}
    except (OSError, yaml.YAMLError) as e:
        parser.error(f'argument -c/--config: cannot read {path!r}: {e}')
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(config) - known)
    if unknown:
        parser.error(f'argument -c/--config: {path!r} has keys that are no options: {", ".join(unknown)}')
    return config


def _assume_sample(parser: argparse.ArgumentParser, given: argparse.Namespace, config: Dict[str, Any]) -> str:
    """Make the sample and its recipe the defaults, and say so. What was given, a model above all, is left alone."""
    recipe = _sample_recipe()
    named = config.get('model') or getattr(given, 'model', None)
    what = f'the bundled Fashion-MNIST sample with its recipe ({_SAMPLE_RECIPE})'
    if named is None:
        what += f' and its contrastive checkpoint ({os.path.basename(recipe["pretrained_path"])})'
    else:
        recipe = {k: v for k, v in recipe.items() if k not in ('model', 'pretrained_path')}
        if timm.is_model(named) and timm.models.get_pretrained_cfg_value(named, 'fixed_input_size'):
            del recipe['img_size']
    parser.set_defaults(**{**recipe, **config})
    return (
        f'No --data-dir or --dataset given: using {what}. '
        'Name your own with --data-dir DIR --model NAME --pretrained-path FILE.'
    )


def parse_args(argv: Optional[List[str]] = None) -> ParsedArguments:
    """Parse a command line. Flags win over the YAML of --config, that over the sample's recipe, that over defaults."""
    parser = create_parser()
    # what was given explicitly: the same parser without defaults
    bare = create_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    given = bare.parse_args(argv)
    config = _read_config(given.config, parser) if 'config' in given else {}
    parser.set_defaults(**config)

    assumed = None
    if not any(getattr(given, key, None) or config.get(key) for key in ('data', 'data_dir', 'dataset')):
        assumed = _assume_sample(parser, given, config)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    return ParsedArguments(args, yaml.safe_dump(vars(args), default_flow_style=False), assumed)
