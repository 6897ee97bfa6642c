"""The settings of a run: every flag of train.py with its default and its help text, in groups

Every field is a flag: `batch_size` is --batch-size. Names, types and defaults of flags are given here and nowhere else.
The parser and docs/flags.md are generated from them. Scripts can build the same dataclasses, for example
OptimizationSettings(lr=0.1). Flags of timm's script keep their names, defaults and meanings, except where docs/flags.md
says otherwise.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Literal, Mapping, Optional

from timm.loss import LOSS_TYPES

from ...loss import METHODS, resolve_method
from ...loss.base import arguments_of, defaults_of
from ...loss.core_tuning import FOR_PIXELS, PARTS
from ...segmentation.decoder import Head
from .flags import flag

SavedArguments = argparse.Namespace  # type in which timm's saver stores the arguments of a run
# sections of flags that timm's script does not have
CORE_TUNING, TUNING = 'Core-tuning', 'tuning a pretrained model'
SEGMENTATION, PUBLISHING = 'segmentation (docs/segmentation.md)', 'publishing (docs/hub.md)'
SIZES = 'training sizes that change'
OWN_SECTIONS = (CORE_TUNING, TUNING, SEGMENTATION, PUBLISHING)

Scaling = Literal['none', 'sqrt', 'linear']
Dtype = Literal['float32', 'float16', 'bfloat16']
Mixtures = Literal['both', 'positive', 'negative', 'none']
Check = Literal['files', 'pixels', 'none']
Decay = Literal['linear', '1-sqrt', 'cosine', 'power', 'exp']


@dataclass(frozen=True)
class DataSettings:
    """Images and labels, augmentation, batches and loaders."""

    data_dir: Optional[str] = flag(
        None, 'images: a folder with a subfolder per class, a tar file or a safetensors file', 'DIR', section='data'
    )
    dataset: str = flag('', 'data set by its name in timm, such as torch/cifar10 or hfds/owner/name', 'TYPE/NAME')
    train_split: str = flag('train', 'split of the data set to train on')
    val_split: str = flag('validation', "split of the data set to validate on, '' for none")
    train_num_samples: Optional[int] = flag(None, 'number of training images, for a stream that cannot tell')
    val_num_samples: Optional[int] = flag(None, 'number of validation images, for a stream that cannot tell')
    dataset_download: bool = flag(False, 'download the data set, if it is of torch/ or tfds/')
    class_map: str = flag('', 'file that maps class names to indices', 'FILE')
    input_img_mode: Optional[str] = flag(None, 'PIL mode that images are read in (default: RGB for 3 channels, else L)')
    input_key: Optional[str] = flag(None, 'field that holds the image, in a data set of records such as hfds/', 'KEY')
    target_key: Optional[str] = flag(
        None, 'field of the label, in records such as hfds/; a,b: one for each class', 'KEY'
    )
    task: Literal['classification', 'multilabel'] = flag('classification', 'multilabel: images have several labels')
    target_format: Literal['indices', 'multihot'] = flag('indices', 'labels of an image in a data set of records')
    multilabel_threshold: float = flag(0.5, 'probability from which a label counts as predicted in F1 scores')
    dataset_trust_remote_code: bool = flag(False, 'allow a Hugging Face data set to run its own code')

    img_size: Optional[int] = flag(
        None, 'image height and width in pixels, for which a ViT is built (default: from the model)', section='images'
    )
    in_chans: Optional[int] = flag(None, 'number of image channels (default: 3)')
    input_size: Optional[List[int]] = flag(None, 'image channels, height, width (default: from the model)', nargs=3)
    crop_pct: Optional[float] = flag(None, 'share of each side of a validation image that the center crop keeps')
    mean: Optional[List[float]] = flag(None, 'mean of each channel, to normalise images (default: from the model)')
    std: Optional[List[float]] = flag(None, 'deviation of each channel, to normalise images (default: from the model)')
    interpolation: str = flag('', 'interpolation for resizing validation images (default: from the model)')
    train_interpolation: str = flag('random', 'interpolation for resizing training images')

    batch_size: int = flag(128, 'images per batch and process', names=('-b',), section='batches and loaders')
    validation_batch_size: Optional[int] = flag(
        None, 'validation images per batch and process (default: --batch-size)', names=('-vb',)
    )
    epoch_repeats: float = flag(0.0, 'how often a stream of images is repeated in an epoch')
    workers: int = flag(4, 'data loading processes per training process', names=('-j',))
    pin_mem: bool = flag(False, 'load images into page-locked memory, to copy them faster to a GPU')
    no_prefetcher: bool = flag(False, 'normalise images in the data loading processes, not on the device')
    worker_seeding: Literal['all', 'part'] = flag('all', "seed loader processes: all generators, or part (not NumPy's)")
    use_multi_epochs_loader: bool = flag(False, 'keep data loading processes running between epochs')

    no_aug: bool = flag(False, 'do not augment training images', section='augmentation')
    train_crop_mode: Optional[str] = flag(None, 'how training images are cropped (default: random resized crop)')
    scale: List[float] = flag([0.08, 1.0], 'least and greatest area of a random crop, as shares of the image')
    ratio: List[float] = flag([3 / 4, 4 / 3], 'range of width over height of a random crop (default: 3/4 4/3)')
    hflip: float = flag(0.5, 'probability of a horizontal flip of a training image')
    vflip: float = flag(0.0, 'probability of a vertical flip of a training image')
    color_jitter: float = flag(0.4, 'strength of the color jitter')
    color_jitter_prob: Optional[float] = flag(None, 'probability of color jitter (default: always)')
    grayscale_prob: Optional[float] = flag(None, 'probability of a conversion to gray (default: never)')
    gaussian_blur_prob: Optional[float] = flag(None, 'probability of a Gaussian blur (default: never)')
    aa: Optional[str] = flag(None, 'AutoAugment or RandAugment policy (default: none)', 'POLICY')
    aug_repeats: float = flag(0, 'augmented copies of each image, spread over the processes, 0 for none')
    aug_splits: int = flag(0, 'AugMix splits: copies of each image in a batch, 2 or more, 0 for none')
    reprob: float = flag(0.0, 'probability that random erasing is applied to an image')
    remode: str = flag('pixel', 'what random erasing fills an area with: pixel, const or rand')
    recount: int = flag(1, 'greatest number of areas that random erasing fills in an image')
    resplit: bool = flag(False, 'do not apply random erasing to the first AugMix split')

    mixup: float = flag(0.0, 'alpha of pixel mixup, 0 for none', section='mixing of pixels')
    cutmix: float = flag(0.0, 'alpha of CutMix, 0 for none')
    cutmix_minmax: Optional[List[float]] = flag(None, 'range of the share of a side that CutMix cuts; turns it on')
    mixup_prob: float = flag(1.0, 'probability that pixel mixup or CutMix is applied to a batch')
    mixup_switch_prob: float = flag(0.5, 'probability of CutMix instead of pixel mixup, if both are on')
    mixup_mode: Literal['batch', 'pair', 'elem', 'half'] = flag('batch', 'images that share one draw of pixel mixup')
    mixup_off_epoch: int = flag(0, 'first epoch without pixel mixup and CutMix, 0 for never')

    train_img_sizes: Optional[List[int]] = flag(
        None, 'image sizes in pixels; every training batch has one of them', section=SIZES
    )
    train_batch_sizes: Optional[List[int]] = flag(None, 'batch sizes for --train-img-sizes (default: --batch-size)')
    train_size_probs: Optional[List[float]] = flag(None, 'probability of each of --train-img-sizes (default: even)')
    train_size_schedule: Literal['constant', 'progressive'] = flag('constant', 'how --train-img-sizes vary over time')
    train_size_schedule_spread: float = flag(0.65, 'how widely a progressive --train-size-schedule draws sizes')
    train_size_random_mix: float = flag(0.1, 'share of batches of any size in a progressive --train-size-schedule')
    train_batches_per_epoch: Optional[int] = flag(
        None, 'number of batches per epoch with --train-img-sizes', names=('--train-steps-per-epoch',)
    )
    variable_batch_loss_scale: Scaling = flag('none', 'how the loss grows with the batch size, for --train-img-sizes')

    naflex_loader: bool = flag(False, 'train a NaFlex model, on patches of images of any size', section='NaFlex')
    naflex_train_seq_lens: List[int] = flag(
        [128, 256, 576, 784, 1024], 'patches per image that NaFlex training batches are drawn with'
    )
    naflex_max_seq_len: int = flag(576, 'greatest number of patches per image in NaFlex validation')
    naflex_patch_sizes: Optional[List[int]] = flag(None, 'patch sizes of NaFlex in pixels (default: from the model)')
    naflex_patch_size_probs: Optional[List[float]] = flag(None, 'probabilities of --naflex-patch-sizes (default: even)')
    naflex_loss_scale: Scaling = flag('linear', 'how the loss grows with the batch size, for --naflex-loader')
    naflex_patchify_channels_first: bool = flag(False, 'order the values of a NaFlex patch by channel first')

    label_fraction: float = flag(1.0, 'share of the training images of each class to use', section=TUNING)
    val_fraction: Optional[float] = flag(None, 'share of each class held out (default: 0.1 if no split validates)')
    global_batch_size: Optional[int] = flag(None, 'images per batch of all processes together, for --batch-size')
    contrast_batch_size: Optional[int] = flag(
        None, 'images of several batches that are contrasted together, in the memory of one (default: a batch)'
    )
    class_balance: bool = flag(False, 'batches in which every image has another one of its class, if there is one')
    check_images: Check = flag('files', 'look before a run for images that cannot be read: files, pixels or none')
    skip_unreadable: bool = flag(False, 'leave validation images that cannot be read out of all scores')
    gpu_augment: bool = flag(False, 'augment on the device, batch by batch; loader processes decode and resize only')
    gpu_augment_size: Optional[int] = flag(
        None, 'height and width that --gpu-augment takes crops from (default: 8/7 of the image size)'
    )

    segmentation: bool = flag(False, 'segmentation: classify pixels, on images with masks', section=SEGMENTATION)
    reduce_zero_label: bool = flag(False, 'ignore mask value 0; value 1 is the first class', section=SEGMENTATION)
    mask_colors: str = flag(
        '', 'file of the colour of each class in masks; index: palette indices are the classes', 'FILE'
    )
    remap_masks: bool = flag(False, 'number the values that occur in masks from 0 on, in their order')
    ignore_index: int = flag(255, 'mask value of the pixels that are neither trained on nor scored')

    @property
    def is_multi_label(self) -> bool:
        """Whether images have several labels, so that targets are multi-hot."""
        return self.task == 'multilabel'

    @property
    def mixes_pixels(self) -> bool:
        """Whether pixel mixup or CutMix is on, so that training targets are soft."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def mixes_in_loader(self) -> bool:
        """Whether the loader of images of one size mixes their pixels, not the training loop."""
        return self.mixes_pixels and not self.no_prefetcher and not self.gpu_augment

    @property
    def batch_sizes(self) -> List[int]:
        """Numbers of images that a training batch of a process can have: one, or one for each of train_img_sizes."""
        sizes = self.train_img_sizes
        return [self.batch_size] if not sizes else self.train_batch_sizes or [self.batch_size] * len(sizes)

    @property
    def contrast_batches(self) -> int:
        """Number of batches whose images are mined and contrasted together."""
        return max(1, (self.contrast_batch_size or 0) // (self.global_batch_size or self.batch_size))

    @property
    def num_channels(self) -> int:
        """Number of image channels: in_chans or that of input_size if given, else 3."""
        if self.in_chans is not None:
            return self.in_chans
        return self.input_size[0] if self.input_size is not None else 3


@dataclass(frozen=True)
class ModelSettings:
    """The model, the checkpoint it starts from, and the moving average of its weights."""

    model: str = flag('resnet50', 'name of the timm model', section='model')
    pretrained: bool = flag(False, "start from timm's pretrained weights of the model")
    pretrained_path: Optional[str] = flag(
        None, 'start from a self-supervised checkpoint: file, folder, URL or name', 'FILE'
    )
    initial_checkpoint: str = flag('', 'start from a checkpoint with its classifier, if that fits', 'FILE')
    num_classes: Optional[int] = flag(None, 'number of classes (default: from the data set, else from the model)')
    gp: Optional[str] = flag(None, 'global pooling: fast, avg, max, avgmax, catavgmax (default: from the model)')
    model_kwargs: Dict[str, Any] = flag({}, 'further arguments of the model, such as output_stride=8', 'K=V')
    channels_last: bool = flag(False, 'use the channels_last memory layout')
    model_dtype: Optional[Dtype] = flag(None, 'dtype of the model weights (default: float32)')
    grad_checkpointing: bool = flag(False, 'recompute activations in the backward pass, to save memory')
    head_init_scale: Optional[float] = flag(None, 'factor for the initial weights and bias of the classifier')
    head_init_bias: Optional[float] = flag(None, 'value of the initial bias of the classifier')
    drop: float = flag(0.0, 'dropout rate before the classifier')
    drop_path: Optional[float] = flag(None, 'rate of stochastic depth (drop path)')
    drop_block: Optional[float] = flag(None, 'rate of DropBlock')
    drop_connect: Optional[float] = flag(None, "not supported: timm's script reads it nowhere, use --drop-path")
    torchcompile: Optional[str] = flag(None, 'run torch.compile, by inductor if no backend is named', const='inductor')
    torchcompile_mode: Optional[str] = flag(None, 'mode of torch.compile')
    fast_norm: bool = flag(False, "use timm's fast normalization layers under mixed precision")
    torchscript: bool = flag(False, 'script the model with TorchScript (plain tuning only)')
    fuser: str = flag('', 'fuser of TorchScript: te, old, nvfuser')

    bn_momentum: Optional[float] = flag(None, 'momentum of BatchNorm', section='BatchNorm and EMA')
    bn_eps: Optional[float] = flag(None, 'epsilon of BatchNorm')
    sync_bn: bool = flag(False, 'synchronise BatchNorm statistics over all processes')
    split_bn: bool = flag(False, 'separate BatchNorm layers for each AugMix split')
    model_ema: bool = flag(False, 'keep and validate a moving average (EMA) of the weights, and publish it if better')
    model_ema_force_cpu: bool = flag(False, 'keep the moving average of the weights on the CPU, unvalidated')
    model_ema_decay: float = flag(0.9998, 'decay of the moving average of the weights per update')
    model_ema_warmup: bool = flag(False, 'start the moving average of the weights with a lower decay')

    checkpoint_key: Optional[str] = flag(
        None, 'which backbone to load from a checkpoint that holds several', 'KEY', section=TUNING
    )
    allow_partial: bool = flag(False, 'load a checkpoint although parts of the backbone are missing')
    model_ema_publish: Literal['better', 'ema'] = flag('better', 'with --model-ema, whose scores and weights count')
    allow_differences: bool = flag(False, 'load a checkpoint although its config differs from the model')
    checkpoint_frames: Optional[int] = flag(None, 'frames of a video checkpoint, averaged to load it for pictures')

    segmentation_head: Optional[Head] = flag(
        None, 'segmentation head (default: chosen by the feature maps)', section=SEGMENTATION
    )


@dataclass(frozen=True)
class LossSettings:
    """The losses of Core-tuning and other methods, of plain tuning and distillation."""

    coretune: bool = flag(False, 'train with Core-tuning, the same as --method core', section=CORE_TUNING)
    method: Optional[str] = flag(
        None,
        f'method of tuning: plain (cross-entropy), {", ".join(METHODS)} (default: plain)',
        'NAME',
        choices=('plain', *METHODS),
    )
    method_kwargs: Dict[str, Any] = flag({}, 'further arguments of the --method, such as weight=0.1', 'K=V')
    coretune_paper: bool = flag(False, 'Core-tuning of pixels as in the paper too, where other flags do not differ')
    contrast_weight: Optional[float] = flag(
        None, 'weight of the contrastive loss, 0 for none (default: of the method, 0.1 for core)'
    )
    coretune_alpha: float = flag(1.0, 'A of Beta(A, A), from which Core-tuning draws mixing shares, > 0')
    coretune_min_positive_lam: float = flag(0.0, 'least share of the hardest positive in its mixture, 0 to 1')
    coretune_min_negative_lam: float = flag(0.8, 'least share of the random negative in its mixture, 0 to 1')
    coretune_smooth: Optional[Mixtures] = flag(
        None, 'mixtures that the classifier learns (default: both; of pixels negative, with a weight of 0.3)'
    )
    coretune_smooth_weight: Optional[float] = flag(None, 'weight of these mixtures beside the clean cross-entropy, > 0')
    coretune_mixtures: Mixtures = flag('both', 'mixtures that enter the contrastive loss')
    coretune_positive_candidates: int = flag(0, 'random images of the class, the hardest of which is mixed; 0 for all')
    contrast_temperature: Optional[float] = flag(
        None, 'temperature of the contrastive loss: divides cosines, > 0 (default: of the method, 0.07 for core)'
    )
    projection_dim: Optional[int] = flag(
        None, 'width of the embedding that the contrastive loss compares (default: of the method, 256 for core)'
    )
    no_coretune_gather: bool = flag(False, 'mine and contrast within each process, not over all processes')
    anchors_per_image: int = flag(64, 'anchor pixels per image in the contrastive loss', section=SEGMENTATION)

    smoothing: float = flag(0.1, 'label smoothing', section='loss on the labels')
    loss: Optional[str] = flag(
        None,
        f'loss on the labels: {", ".join(LOSS_TYPES)}; coretune: that of --coretune (default: ce)',
        'NAME',
        choices=(*LOSS_TYPES, 'coretune'),
    )
    loss_class_weight: Optional[str] = flag(
        None, 'weight of each class: numbers, a file, inv_freq or effective_num (default: 1)', 'W'
    )
    loss_pos_weight: Optional[str] = flag(
        None, 'weight of the positives of each class in bce and asl: numbers, a file or neg_pos (default: 1)', 'W'
    )
    loss_weight_power: float = flag(1.0, 'power of the class frequencies in inv_freq and neg_pos weights')
    class_stats: Optional[str] = flag(
        None, 'JSON file of class counts, for weights and --loss db (default: counted in the training split)', 'FILE'
    )
    poly_epsilon: float = flag(2.0, 'epsilon of --loss poly, 0 for its cross-entropy alone')
    poly_gamma: float = flag(0.0, 'focusing parameter of --loss poly with several labels an image')
    jsd_loss: bool = flag(False, 'Jensen-Shannon divergence with cross-entropy, the same as --loss jsd')
    bce_loss: bool = flag(False, 'binary cross-entropy in place of cross-entropy, the same as --loss bce')
    bce_sum: bool = flag(False, 'sum the binary cross-entropy over the classes')
    bce_target_thresh: Optional[float] = flag(None, 'threshold that turns soft targets of --loss bce into 0 or 1')
    bce_pos_weight: Optional[float] = flag(None, 'weight of the positives, the same as --loss-pos-weight')

    kd_model_name: Optional[str] = flag(None, 'timm model to distill from (the teacher)', section='distillation')
    kd_distill_type: Literal['logit', 'feature', 'token'] = flag('logit', 'teacher output to distill')
    kd_loss_type: str = flag('kl', 'loss for distilling logits')
    distill_loss_weight: Optional[float] = flag(None, 'weight of the distillation loss')
    task_loss_weight: Optional[float] = flag(None, 'weight of the loss on the labels in distillation')
    kd_temperature: float = flag(4.0, 'temperature of distillation, which divides the logits')
    kd_student_feature_dim: Optional[int] = flag(None, 'feature width of the student (default: from the model)')
    kd_teacher_feature_dim: Optional[int] = flag(None, 'feature width of the teacher (default: from the model)')
    kd_token_distill_type: Literal['soft', 'hard'] = flag('soft', 'teacher output for the distillation token')

    @property
    def task_loss(self) -> Optional[str]:
        """Name of the loss in METHODS, None for plain tuning and distillation."""
        return resolve_method(self.coretune or self.loss == 'coretune', self.method)

    @property
    def label_losses(self) -> List[str]:
        """Names of the losses on the labels that flags ask for, each once. coretune asks for a method instead."""
        names = [self.loss, 'jsd' if self.jsd_loss else None, 'bce' if self.bce_loss else None]
        return [name for name in dict.fromkeys(names) if name is not None and name != 'coretune']

    @property
    def pos_weight(self) -> Optional[str]:
        """Weight of the positives, by either of its flags."""
        return self.loss_pos_weight if self.bce_pos_weight is None else str(self.bce_pos_weight)

    def num_candidates(self, num_rows: int) -> int:
        """Number of rows that an anchor is compared with: the others of num_rows in the batch, and its mixtures."""
        mixed = len(PARTS[self.coretune_mixtures]) if self.task_loss == 'core' else 0
        return num_rows - 1 + mixed

    def with_defaults(self, pixels: bool) -> 'LossSettings':
        """The same with values in place of None, where the default is that of the method, for images or for pixels."""
        defaults = {**defaults_of(METHODS['core']), **defaults_of(METHODS[self.task_loss or 'core'])}
        given: Dict[str, Any] = dict(
            contrast_weight=self.contrast_weight,
            temperature=self.contrast_temperature,
            projection_dim=self.projection_dim,
        )
        weight, temperature, projection_dim = (defaults[k] if v is None else v for k, v in given.items())
        smooth, smooth_weight = self.coretune_smooth, self.coretune_smooth_weight
        if smooth is None:
            by_default = {**defaults, **(FOR_PIXELS if pixels and not self.coretune_paper else {})}
            smooth, smooth_weight = by_default['smooth'], smooth_weight or by_default['smooth_weight']
        return dataclasses.replace(
            self,
            contrast_weight=weight,
            contrast_temperature=temperature,
            projection_dim=projection_dim,
            coretune_smooth=smooth,
            coretune_smooth_weight=smooth_weight,
        )

    def loss_kwargs(self, pixels: bool = False) -> Dict[str, Any]:
        """Arguments of the task loss, except num_features, which depends on the model."""
        resolved = self.with_defaults(pixels)
        arguments = dict(
            contrast_weight=resolved.contrast_weight,
            mixup_alpha=self.coretune_alpha,
            min_positive_lam=self.coretune_min_positive_lam,
            min_negative_lam=self.coretune_min_negative_lam,
            smooth=resolved.coretune_smooth,
            smooth_weight=resolved.coretune_smooth_weight,
            mixtures=self.coretune_mixtures,
            positive_candidates=self.coretune_positive_candidates,
            temperature=resolved.contrast_temperature,
            projection_dim=resolved.projection_dim,
            label_smoothing=self.smoothing,
            gather=not self.no_coretune_gather,
        )
        known = arguments_of(METHODS[str(self.task_loss)])
        return {**{name: value for name, value in arguments.items() if name in known}, **self.method_kwargs}


@dataclass(frozen=True)
class OptimizationSettings:
    """Optimizer, learning rate, schedule and gradient clipping."""

    opt: str = flag('sgd', 'timm optimizer (sgd has Nesterov momentum)', section='optimizer')
    opt_eps: Optional[float] = flag(None, 'epsilon of the optimizer')
    opt_betas: Optional[List[float]] = flag(None, 'betas of the optimizer')
    momentum: float = flag(0.9, 'momentum of the optimizer')
    weight_decay: float = flag(2e-5, 'weight decay')
    clip_grad: Optional[float] = flag(None, 'threshold of gradient clipping (default: no clipping)')
    clip_mode: Literal['norm', 'value', 'agc'] = flag('norm', 'how --clip-grad clips: by norm, value or AGC')
    layer_decay: Optional[float] = flag(None, 'learning rate factor from each layer to the one before it')
    layer_decay_min_scale: float = flag(0, 'smallest learning rate factor with --layer-decay')
    layer_decay_no_opt_scale: Optional[float] = flag(None, 'rate factor below which --layer-decay freezes layers')
    opt_kwargs: Dict[str, Any] = flag({}, 'further arguments of the optimizer', 'K=V')
    grad_accum_steps: int = flag(1, 'batches per update (gradient accumulation)')

    lr: Optional[float] = flag(None, 'learning rate (default: --lr-base scaled by the batch)', section='learning rate')
    lr_base: float = flag(0.1, 'learning rate at a global batch of --lr-base-size')
    lr_base_size: int = flag(256, 'global batch size that --lr-base is meant for')
    lr_base_scale: Literal['', 'linear', 'sqrt'] = flag('', 'how --lr-base grows with the batch (default: by --opt)')
    sched: str = flag('cosine', 'timm scheduler of the learning rate')
    sched_on_updates: bool = flag(False, 'change the learning rate after every update, not every epoch')
    lr_noise: Optional[List[float]] = flag(None, 'start and end of learning rate noise, as shares of the run')
    lr_noise_pct: float = flag(0.67, 'limit of the learning rate noise, as a share of the rate')
    lr_noise_std: float = flag(1.0, 'standard deviation of the learning rate noise')
    lr_cycle_mul: float = flag(1.0, 'length of each learning rate cycle relative to the one before')
    lr_cycle_decay: float = flag(0.5, 'learning rate of each cycle relative to the one before')
    lr_cycle_limit: int = flag(1, 'number of learning rate cycles')
    lr_k_decay: float = flag(1.0, 'k of the k-decay of cosine and poly schedules')
    warmup_lr: float = flag(1e-5, 'learning rate at the start of warm-up')
    min_lr: float = flag(0, 'lowest learning rate of the schedule')
    epochs: int = flag(300, 'number of epochs to train')
    decay_milestones: List[int] = flag([90, 180, 270], 'epochs at which the multistep schedule decays')
    decay_epochs: Optional[float] = flag(
        None, 'epochs between decays of step, or of the decay of wsd and rsqrt (default: 90; a fifth of the schedule)'
    )
    lr_decay_fn: Optional[Decay] = flag(None, 'how wsd and rsqrt decay (default: 1-sqrt for wsd, linear for rsqrt)')
    lr_stable_timescale: Optional[float] = flag(None, 'timescale of rsqrt in epochs (default: --warmup-epochs)')
    warmup_epochs: int = flag(5, 'epochs of learning rate warm-up')
    warmup_prefix: bool = flag(False, 'start the learning rate schedule after warm-up, not with it')
    cooldown_epochs: int = flag(0, 'epochs at the lowest learning rate after the schedule')
    patience_epochs: int = flag(10, 'epochs without improvement before the plateau schedule decays')
    decay_rate: float = flag(0.1, 'factor for the learning rate at each decay of the schedule', names=('--dr',))

    head_lr_scale: float = flag(1.0, 'factor for the learning rate of the head', section=TUNING)
    freeze_epochs: int = flag(0, 'number of first epochs in which only the head trains')


@dataclass(frozen=True)
class LoopSettings:
    """Devices, precision, validation and the loop over epochs."""

    device: str = flag('cuda', 'kind of device; cpu uses no accelerator, else accelerate decides', section='device')
    amp: bool = flag(False, 'train in mixed precision, unless accelerate launch sets a precision')
    amp_dtype: Literal['float16', 'bfloat16'] = flag('float16', 'dtype of mixed precision')
    no_ddp_bb: bool = flag(False, 'do not broadcast buffers to all processes in every forward pass')
    synchronize_step: bool = flag(False, 'wait for the device after every update')
    local_rank: int = flag(0, 'index of the process on its machine, set by accelerate launch', names=('--local_rank',))
    device_modules: Optional[List[str]] = flag(None, 'Python modules to import for further kinds of devices')
    seed: int = flag(42, 'random seed')
    dist_bn: Literal['reduce', 'broadcast', 'none', ''] = flag('reduce', 'how processes share BatchNorm statistics')

    start_epoch: Optional[int] = flag(None, 'epoch to start at (default: that of --resume, else 0)', section='loop')
    stop_epoch: Optional[int] = flag(None, 'stop after N epochs, and leave the schedule as --epochs makes it')
    log_interval: int = flag(50, 'updates between lines of the training log')
    val_interval: int = flag(1, 'epochs between validations')
    eval_metric: str = flag('top1', 'score that selects the best epoch: top1, top5, loss, macro_f1, ece, miou, ...')
    tta: int = flag(0, 'number of neighbouring images whose outputs validation averages, 0 for none')

    metrics: str = flag('', 'further scores, comma-separated: confusion, per-class, ece', 'LIST', section=TUNING)
    watch_features: int = flag(0, 'epochs between measurements of the features: kNN, RankMe, scatter; 0 for none', 'N')
    patience: Optional[int] = flag(None, 'stop after N validations without improvement')
    catch_diverged: bool = flag(False, 'check losses before every update, and keep a step that diverged for replay')
    time_limit: Optional[float] = flag(
        None, 'save a state and exit with status 143 so long after the start of the process', 'MINUTES'
    )
    eval_only: bool = flag(False, 'only validate, the same as --epochs 0')
    eval_output: Optional[str] = flag(None, 'write scores and tables of --eval-only to this folder', 'FOLDER')


@dataclass(frozen=True)
class OutputSettings:
    """The run folder, training states to continue from, logging and publishing."""

    output: str = flag('', 'parent of all run folders (default: output/train)', 'DIR', section='run')
    experiment: str = flag('', 'name of the run folder (default: time, model and image size)')
    resume: str = flag('', 'training state to continue from; auto: the newest intact one of --experiment', 'FILE')
    no_resume_opt: bool = flag(False, 'continue a training state without that of the optimizer')
    recovery_interval: int = flag(0, 'updates between training states saved within an epoch, 0 for none')
    checkpoint_hist: int = flag(10, 'number of best epochs whose training states are kept')
    save_epochs: List[int] = flag([], 'numbers of epochs after which the state is kept as milestone-N.pth.tar')
    save_images: bool = flag(False, 'save a training batch as a picture at every line of the log')
    log_wandb: bool = flag(False, 'log to Weights & Biases, the same as --log-with wandb')
    wandb_project: Optional[str] = flag(None, 'project name in Weights & Biases')
    wandb_tags: List[str] = flag([], 'tags of the run in Weights & Biases')
    wandb_resume_id: str = flag('', 'id of the Weights & Biases run to continue, with --resume')

    report: bool = flag(False, 'write report.html at the end of the run (docs/report.md)', section=TUNING)
    log_with: str = flag('', 'experiment trackers, comma-separated, such as tensorboard', 'LIST')

    push_to_hub: Optional[str] = flag(None, 'push the best weights to this Hub repo', 'OWNER/NAME', section=PUBLISHING)
    hub_private: bool = flag(False, 'make the repository of --push-to-hub private')
    hub_revision: Optional[str] = flag(None, 'branch of --push-to-hub, created if missing (default: main)')

    @property
    def root(self) -> str:
        """Parent of all run folders."""
        return self.output or './output/train'


@dataclass(frozen=True)
class Settings:
    """All settings of a run, in the groups that use them."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> 'Settings':
        """Create settings from values named like the flags. Other names are ignored."""
        groups = {}
        for group in dataclasses.fields(cls):
            kind: Any = group.default_factory
            names = [f.name for f in dataclasses.fields(kind)]
            groups[group.name] = kind(**{name: values[name] for name in names if name in values})
        return cls(**groups)

    def flat(self) -> Dict[str, Any]:
        """All values in one dictionary, named like the flags."""
        groups = [getattr(self, group.name) for group in dataclasses.fields(self)]
        return {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
