"""Model and task from the arguments"""

import argparse
import logging
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, safe_model_name
from timm.task import ClassificationTask, TrainingTask

from ..checkpoint import load_checkpoint
from ..task import CoreTuningTask
from .data import get_in_chans

_logger = logging.getLogger(__name__)


def resolve_num_classes(args: argparse.Namespace, num_data_classes: Optional[int]) -> Optional[int]:
    """Classes of the model: those asked for, else those of the data, else None, the model's own.

    Raises:
        ValueError: Fewer were asked for than the data has.
    """
    if args.num_classes is None:
        return num_data_classes
    if num_data_classes is not None and args.num_classes < num_data_classes:
        raise ValueError(
            f'Expected --num-classes of at least the {num_data_classes} classes of the data, got {args.num_classes}. '
            'Leave it out to have as many as the data.'
        )
    return args.num_classes


def create_backbone(args: argparse.Namespace, num_classes: Optional[int]) -> nn.Module:
    """Create the model and load the checkpoint it starts from."""
    model = create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=get_in_chans(args),
        num_classes=num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        **args.model_kwargs,
    )
    if args.pretrained_path:
        load_checkpoint(model, args.pretrained_path)
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint, load_classifier=True)
    with torch.no_grad():
        if args.head_init_scale is not None:
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    _logger.info(
        f'Model {safe_model_name(args.model)} created, param count:{sum(p.numel() for p in model.parameters())}'
    )
    return model


def place_model(args: argparse.Namespace, model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Move the model to its device, memory layout and kind of BatchNorm."""
    model.to(device=accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and args.sync_bn:
        model = convert_sync_batchnorm(model)
    return model


def coretune_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of CoreTuningLoss, as timm's optimizer_kwargs makes those of an optimizer."""
    return dict(
        contrast_weight=args.contrast_weight,
        mixup_alpha=args.coretune_alpha,
        min_positive_lam=args.coretune_min_positive_lam,
        temperature=args.contrast_temperature,
        projection_dim=args.projection_dim,
        label_smoothing=args.smoothing,
        gather=not args.no_coretune_gather,
        generator=torch.Generator().manual_seed(args.seed),
    )


def create_task(
    args: argparse.Namespace, model: nn.Module, accelerator: Accelerator, soft_target: bool
) -> TrainingTask:
    """Core-tuning, or plain cross-entropy tuning to compare with.

    Args:
        args: Arguments of the run.
        model: The model, on its device.
        accelerator: Device and processes.
        soft_target: Whether pixel mixup makes soft targets.
    """
    common = dict(device=accelerator.device, verbose=accelerator.is_main_process)
    if args.coretune:
        if soft_target:
            _logger.info('Pixel mixup makes soft targets: pairs are mined by the most probable class of each image.')
        return CoreTuningTask(model, **coretune_kwargs(args), **common)
    if soft_target:
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    return ClassificationTask(model, criterion.to(accelerator.device), **common)
