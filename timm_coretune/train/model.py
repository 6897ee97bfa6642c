"""Model and task from the arguments"""

import argparse
import logging
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, safe_model_name
from timm.task import ClassificationTask, TrainingTask
from timm.utils import set_jit_fuser

from ..checkpoint import load_checkpoint
from ..task import CoreTuningTask
from .cli.arguments import mixes_pixels
from .data.datasets import get_in_chans
from .segmentation import create_pixel_task

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
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
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
        scriptable=args.torchscript,
        **args.model_kwargs,
    )
    options = dict(checkpoint_key=args.checkpoint_key, allow_partial=args.allow_partial)
    if args.pretrained_path:
        load_checkpoint(model, args.pretrained_path, **options)
    if args.initial_checkpoint and not args.segmentation:  # of the whole, there
        load_checkpoint(model, args.initial_checkpoint, load_classifier=True, **options)
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
    """Move the model to its device, dtype, memory layout and kind of BatchNorm."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=accelerator.device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and args.sync_bn:
        model = convert_sync_batchnorm(model)
        _logger.info('Converted model to use Synchronized BatchNorm.')
    return torch.jit.script(model) if args.torchscript else model


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
        # patches of different lengths come in batches of different sizes
        uneven_batches=args.naflex_loader,
        generator=torch.Generator().manual_seed(args.seed),
    )


def create_criterion(args: argparse.Namespace) -> nn.Module:
    """The loss of plain tuning, chosen as timm's script does."""
    if args.jsd_loss:
        return JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    mixes = mixes_pixels(args)  # mixing smooths the labels itself
    if args.bce_loss and (mixes or args.smoothing):
        return BinaryCrossEntropy(
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
            **({} if mixes else dict(smoothing=args.smoothing)),
        )
    if mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def _create_distillation_task(args: argparse.Namespace, model: nn.Module, **kwargs) -> TrainingTask:
    # where the installed timm has them
    from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask

    kwargs.update(
        student_model=model,
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **kwargs,
        )
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(
            distill_type=args.kd_token_distill_type,
            temperature=args.kd_temperature,
            **kwargs,
        )
    return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **kwargs)


def create_task(args: argparse.Namespace, model: nn.Module, accelerator: Accelerator) -> TrainingTask:
    """Core-tuning, or one of timm's tasks to compare with."""
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    common = dict(device=accelerator.device, dtype=dtype, verbose=accelerator.is_main_process)
    if args.segmentation:
        return create_pixel_task(args, model, coretune_kwargs(args), common)
    if args.coretune:
        if mixes_pixels(args):
            _logger.info('Pixel mixup makes soft targets: pairs are mined by the most probable class of each image.')
        return CoreTuningTask(model, **coretune_kwargs(args), **common)
    common['criterion'] = create_criterion(args).to(accelerator.device)
    if args.kd_model_name:
        return _create_distillation_task(args, model, **common)
    return ClassificationTask(model, **common)
