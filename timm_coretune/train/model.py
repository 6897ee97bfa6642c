"""The timm model of a run: created, loaded and placed on its device"""

import copy
import logging
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, safe_model_name
from timm.task import TrainingTask, load_task_ema_checkpoint
from timm.utils import set_jit_fuser

from ..checkpoint import load_checkpoint
from ..lora import add_lora, log_lora
from ..model_config import PREPROCESSING
from ..run_folder import CONFIG_NAME
from .cli.errors import asked_by
from .cli.settings import DataSettings, ModelSettings, Settings
from .image_size import size_arguments

_logger = logging.getLogger(__name__)


def resolve_num_classes(asked: Optional[int], num_data_classes: Optional[int]) -> Optional[int]:
    """Number of classes: the number asked for, else that of the data, else None, which means the model's default.

    Raises:
        ValueError: Fewer classes were asked for than the data has.
    """
    if asked is None:
        return num_data_classes
    if num_data_classes is not None and asked < num_data_classes:
        raise ValueError(
            f'Expected --num-classes of at least the {num_data_classes} classes of the data, got {asked}. '
            'Leave it out to have as many as the data.'
        )
    return asked


def create_backbone(
    settings: ModelSettings, num_classes: Optional[int], data: DataSettings, whole: bool = True
) -> nn.Module:
    """Create the model or backbone and load the checkpoint it starts from.

    Args:
        settings: Model and checkpoints.
        num_classes: Number of classes, None for the model's default.
        data: Number of image channels, and the flags that win over what a checkpoint says about its images.
        whole: Load --initial-checkpoint too. False for a backbone, as that checkpoint is of the model around it.
    """
    if settings.fuser:
        set_jit_fuser(settings.fuser)
    if settings.fast_norm:
        set_fast_norm()
    by_flags: Dict[str, Any] = dict(
        pretrained=settings.pretrained,
        in_chans=data.num_channels,
        num_classes=num_classes,
        drop_rate=settings.drop,
        drop_path_rate=settings.drop_path,
        drop_block_rate=settings.drop_block,
        global_pool=settings.gp,
        bn_momentum=settings.bn_momentum,
        bn_eps=settings.bn_eps,
        scriptable=settings.torchscript,
    )
    twice = sorted(by_flags.keys() & settings.model_kwargs.keys())
    if twice:
        raise ValueError(f'--model-kwargs: {", ".join(twice)} has a flag of its own. Use that in its place.')
    with asked_by('--model, --model-kwargs and other flags of the model'):
        kwargs = {**by_flags, **settings.model_kwargs}
        for_size = size_arguments(settings.model, kwargs, data, resizes=not whole)
        model: Any = create_model(settings.model, **{**kwargs, **for_size})
    load_backbone(settings, model)
    if settings.pretrained_path and settings.head_init_scale is None:
        narrow_classifier(model)
    if whole:
        load_initial_checkpoint(settings, model, data)
    with torch.no_grad():
        if settings.head_init_scale is not None:
            model.get_classifier().weight.mul_(settings.head_init_scale)
            model.get_classifier().bias.mul_(settings.head_init_scale)
        if settings.head_init_bias is not None:
            nn.init.constant_(model.get_classifier().bias, settings.head_init_bias)
    if settings.grad_checkpointing:
        with asked_by('--grad-checkpointing, which this model may not support'):
            model.set_grad_checkpointing(enable=True)
    num_parameters = sum(p.numel() for p in model.parameters())
    _logger.info(f'Model {safe_model_name(settings.model)} created, param count:{num_parameters}')
    return model


def load_backbone(settings: ModelSettings, model: nn.Module) -> None:
    """Load --pretrained-path into a model without its classifier, if it is given."""
    if settings.pretrained_path:
        load_checkpoint(
            model,
            settings.pretrained_path,
            checkpoint_key=settings.checkpoint_key,
            allow_partial=settings.allow_partial,
            allow_differences=settings.allow_differences,
            frames=settings.checkpoint_frames,
        )


@torch.no_grad()
def narrow_classifier(model: Any) -> None:
    """Scale new weights of a classifier down to the spread with which torch starts a linear layer, if theirs is wider.

    timm starts the classifiers of EfficientNet, MobileNet and relatives within 1 / sqrt(classes). With few classes the
    first logits are then so large that their gradients destroy the pretrained features.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return
    torchs, found = (3 * classifier.in_features) ** -0.5, classifier.weight.std().item()
    if found > 2 * torchs:
        classifier.weight.mul_(torchs / found)
        _logger.info(
            f'The weights of the new classifier were scaled down from a standard deviation of {found:.3f} to '
            f'{torchs:.3f}. Logits that start large would destroy the pretrained features. --head-init-scale 1 '
            'keeps the weights.'
        )


def load_initial_checkpoint(settings: ModelSettings, model: nn.Module, data: Optional[DataSettings] = None) -> None:
    """Load --initial-checkpoint if it is given, with its classifier if that fits the model.

    If the checkpoint says how images are prepared, this becomes the default of the model.

    Args:
        settings: Model and checkpoint.
        model: Model to load it into.
        data: Flags that win over what the checkpoint says about its images, for the log.
    """
    if not settings.initial_checkpoint:
        return
    report = load_checkpoint(
        model,
        settings.initial_checkpoint,
        load_classifier=True,
        checkpoint_key=settings.checkpoint_key,
        allow_partial=settings.allow_partial,
        allow_differences=settings.allow_differences,
    )
    if data is not None:
        log_preprocessing(data, report.data_config if report.described_by else None, report.described_by)


def log_preprocessing(data: DataSettings, described: Optional[Dict[str, Any]], path: Optional[str]) -> None:
    """Log in one line what the config of a checkpoint says about the preparation of images, and which flags win.

    Args:
        data: The flags.
        described: Values from the config, None if the checkpoint has no config.
        path: The config.
    """
    if not described:
        _logger.info(
            f'No {CONFIG_NAME} of this model is beside the checkpoint: images are prepared as the timm model and flags '
            'say, unless a line above says otherwise.'
        )
        return
    flags = {key: getattr(data, key, None) or None for key in PREPROCESSING}
    if data.img_size is not None and flags['input_size'] is None:
        flags['input_size'] = data.img_size
    taken = [f'{key} {value}' for key, value in described.items() if flags.get(key) is None]
    given = [f'{key} {value}' for key, value in flags.items() if value is not None]
    text = f'Images are prepared as {path} says: {", ".join(taken) or "nothing"}'
    _logger.info(f'{text}; by flags or the YAML file: {", ".join(given)}.' if given else f'{text}.')


def adapt_model(settings: ModelSettings, model: nn.Module, data_config: Dict[str, Any]) -> None:
    """Give the model the adapters that --lora-rank asks for."""
    if settings.lora_rank is not None:
        with asked_by('--lora-rank'):
            counts = add_lora(model, settings.lora_rank, settings.lora_alpha, data_config['input_size'])
        log_lora(counts, settings.lora_rank)


def place_model(settings: ModelSettings, model: nn.Module, accelerator: Accelerator, aug_splits: int = 0) -> nn.Module:
    """Move the model to its device, dtype and memory layout, and convert its BatchNorm layers."""
    if settings.split_bn:
        model = convert_splitbn_model(model, max(aug_splits, 2))
    model.to(device=accelerator.device, dtype=getattr(torch, settings.model_dtype or 'float32'))
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and settings.sync_bn:
        model = convert_sync_batchnorm(model)
        _logger.info('Converted model to use Synchronized BatchNorm.')
    return torch.jit.script(model) if settings.torchscript else model


def check_single_images(settings: Settings, model: nn.Module, data_config: Dict[str, Any], num_processes: int) -> None:
    """Refuse batches of one image that a BatchNorm layer of the model cannot train on.

    It normalises each channel over the batch and all places of the map. With one image and a map of one place there is
    a single value, and no variance. Such a batch is tried, before anything is written.

    Args:
        settings: The settings of a run that trains.
        model: The model, on the CPU.
        data_config: Size of the images.
        num_processes: Number of processes, over which --sync-bn normalises.

    Raises:
        ValueError: There is such a layer.
    """
    data, optimization = settings.data, settings.optimization
    shares_statistics = settings.model.sync_bn and num_processes > 1
    if data.naflex_loader or shares_statistics or optimization.freeze_epochs >= optimization.epochs:
        return
    channels, *size = data_config['input_size']
    halves = data.mixes_pixels and data.mixup_mode == 'half'
    copies = 1 if settings.model.split_bn else max(data.aug_splits, 1)
    for index, batch_size in enumerate(data.batch_sizes):
        if batch_size * copies // (1 + halves) != 1:
            continue
        if data.train_img_sizes:
            size = [data.train_img_sizes[index]] * 2
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                copy.deepcopy(model).train()(torch.zeros(1, channels, *size))
        except Exception as e:
            if 'more than 1 value per channel' not in str(e):
                continue  # it says nothing about BatchNorm, and training may go another way
            reason = '--mixup-mode half leaves half of it, and ' if halves else ''
            raise ValueError(
                f'Expected 2 or more images in a batch of each process, got --batch-size {batch_size}: {reason}'
                f'BatchNorm of {settings.model.model} cannot normalise a single value per channel, which an image of '
                f'{" x ".join(map(str, size))} comes to. Raise the batch size or --img-size, or use --sync-bn with '
                'several processes.'
            ) from e


def setup_ema(settings: ModelSettings, task: TrainingTask, resumed: Optional[str]) -> None:
    """Start the moving average of the weights, or load it from the training state that is resumed."""
    if not settings.model_ema:
        return
    task.setup_ema(
        decay=settings.model_ema_decay,
        use_warmup=settings.model_ema_warmup,
        device=torch.device('cpu') if settings.model_ema_force_cpu else None,
    )
    if resumed:
        load_task_ema_checkpoint(task, resumed)


def compile_task(settings: ModelSettings, task: TrainingTask) -> None:
    """With --torchcompile, compile the training step, the evaluation model and its moving average."""
    if not settings.torchcompile:
        return
    task.compile(backend=settings.torchcompile, mode=settings.torchcompile_mode)
    if task.has_ema():
        task.compile_ema(backend=settings.torchcompile, mode=settings.torchcompile_mode)
