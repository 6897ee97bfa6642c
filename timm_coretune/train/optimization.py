"""Learning rate, optimizer, schedule and gradient clipping from the arguments"""

import argparse
import logging
from typing import Any, List, Tuple

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad

from ..evaluation.scores import SCORES
from .freezing import head_parameters

_logger = logging.getLogger(__name__)


def resolve_lr(args: argparse.Namespace, batch_size: float, num_processes: int) -> float:
    """The learning rate: --lr, else --lr-base scaled by the global batch as in timm."""
    if args.lr:
        return args.lr
    global_batch_size = batch_size * num_processes * args.grad_accum_steps
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    ratio = global_batch_size / args.lr_base_size
    lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    _logger.info(
        f'Learning rate ({lr}) calculated from base learning rate ({args.lr_base}) and effective global batch size '
        f'({global_batch_size:g}) with {scale} scaling.'
    )
    return lr


def _scale_head(optimizer: torch.optim.Optimizer, task: TrainingTask, scale: float) -> None:
    """Give the head groups of its own, with a factor that timm's schedulers apply."""
    head = {id(p) for p in head_parameters(task)}
    groups: List[dict] = []
    for group in optimizer.param_groups:
        for is_head in (False, True):
            params = [p for p in group['params'] if (id(p) in head) == is_head]
            if params:
                lr_scale = group.get('lr_scale', 1.0) * (scale if is_head else 1.0)
                groups.append({**group, 'params': params, 'lr_scale': lr_scale, 'lr': group['lr'] * lr_scale})
    optimizer.param_groups[:] = groups


def create_optimizer(args: argparse.Namespace, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer for everything the task trains. args.lr must be resolved."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    for group in optimizer.param_groups:
        group.setdefault('initial_lr', group['lr'])
    if args.head_lr_scale != 1.0:
        _scale_head(optimizer, task, args.head_lr_scale)
    _logger.info(f'Created {type(optimizer).__name__} ({args.opt}) optimizer: lr {args.lr:g}, wd {args.weight_decay:g}')
    return optimizer


def create_schedule(
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
) -> Tuple[Any, int]:
    """timm's scheduler, which the loop steps itself, and the number of epochs."""
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args, decreasing_metric=not SCORES[args.eval_metric].higher_is_better),
        updates_per_epoch=updates_per_epoch,
    )
    stepped = 'epoch' if scheduler is None or scheduler.t_in_epochs else 'update'
    _logger.info(f'Scheduled epochs: {num_epochs}. LR stepped per {stepped}.')
    return scheduler, num_epochs


def clip_gradients(
    args: argparse.Namespace,
    accelerator: Accelerator,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Clip the gradients of what the task names, all but the classifier in mode agc."""
    if args.clip_grad is None:
        return
    parameters = list(task.get_clip_parameters(exclude_head='agc' in args.clip_mode))
    if args.clip_mode == 'norm':
        accelerator.clip_grad_norm_(parameters, args.clip_grad)
    else:
        accelerator.unscale_gradients(optimizer)
        dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
