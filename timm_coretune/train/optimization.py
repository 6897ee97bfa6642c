"""Learning rate, optimizer, schedule and gradient clipping"""

import logging
from typing import Any, List, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad

from ..evaluation.scores import SCORES
from .cli.settings import OptimizationSettings
from .freezing import head_parameters

_logger = logging.getLogger(__name__)


def count_accumulated(grad_accum_steps: int, batches_per_epoch: Optional[int]) -> int:
    """Greatest number of batches of an update, which ends with its epoch. None is an unknown number of batches."""
    return min(grad_accum_steps, batches_per_epoch or grad_accum_steps)


def resolve_lr(
    settings: OptimizationSettings, batch_size: float, num_processes: int, batches_per_epoch: Optional[int] = None
) -> float:
    """The learning rate: --lr if given, else --lr-base scaled by the images of an update as in timm.

    Args:
        settings: Learning rate and accumulation.
        batch_size: Images per batch and process.
        num_processes: Number of processes.
        batches_per_epoch: Batches per epoch and process, of which an update has no more. None if unknown.
    """
    accum = count_accumulated(settings.grad_accum_steps, batches_per_epoch)
    if accum < settings.grad_accum_steps:
        _logger.warning(
            f'--grad-accum-steps {settings.grad_accum_steps}: an epoch has {accum} batch(es), and no update has more.'
        )
    if settings.lr:
        return settings.lr
    global_batch_size = batch_size * num_processes * accum
    is_adaptive = any(name in settings.opt.lower() for name in ('ada', 'lamb'))
    scale = settings.lr_base_scale or ('sqrt' if is_adaptive else 'linear')
    ratio = global_batch_size / settings.lr_base_size
    lr = settings.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    _logger.info(
        f'Learning rate ({lr}) calculated from base learning rate ({settings.lr_base}) and effective global batch size '
        f'({global_batch_size:g}) with {scale} scaling.'
    )
    return lr


def _scale_head(optimizer: torch.optim.Optimizer, task: TrainingTask, scale: float) -> None:
    """Put the head into parameter groups of its own, with an lr_scale that timm's schedulers apply."""
    head = {id(p) for p in head_parameters(task)}
    groups: List[dict] = []
    for group in optimizer.param_groups:
        for is_head in (False, True):
            params = [p for p in group['params'] if (id(p) in head) == is_head]
            if params:
                lr_scale = group.get('lr_scale', 1.0) * (scale if is_head else 1.0)
                groups.append({**group, 'params': params, 'lr_scale': lr_scale})
    optimizer.param_groups[:] = groups


def create_optimizer(settings: OptimizationSettings, task: TrainingTask, lr: float) -> torch.optim.Optimizer:
    """Create timm's optimizer for all that the task trains, at the learning rate lr."""
    kwargs = {**optimizer_kwargs(cfg=settings), 'lr': lr}
    optimizer = create_optimizer_v2(cast(nn.Module, task.get_trainable_module()), **kwargs, **settings.opt_kwargs)
    for group in optimizer.param_groups:
        group.setdefault('initial_lr', group['lr'])
    if settings.head_lr_scale != 1.0:
        _scale_head(optimizer, task, settings.head_lr_scale)
    for group in optimizer.param_groups:  # schedulers do this too, but --sched none has none
        group['lr'] = group['initial_lr'] * group.get('lr_scale', 1.0)
    name = f'{type(optimizer).__name__} ({settings.opt})'
    _logger.info(f'Created {name} optimizer: lr {lr:g}, wd {settings.weight_decay:g}')
    return optimizer


def create_schedule(
    settings: OptimizationSettings,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    eval_metric: str = 'top1',
    seed: int = 42,
) -> Tuple[Any, int]:
    """Create timm's scheduler, which the training loop steps, and return it with the number of epochs.

    Args:
        settings: Kind and shape of the schedule.
        optimizer: Optimizer whose learning rates are scheduled.
        updates_per_epoch: Number of updates per epoch.
        eval_metric: Score that a plateau schedule watches.
        seed: Seed of the noise in the learning rate.
    """
    kwargs = scheduler_kwargs(settings, decreasing_metric=not SCORES[eval_metric].higher_is_better)
    kwargs['noise_seed'] = seed
    scheduler, num_epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    stepped = 'epoch' if scheduler is None or scheduler.t_in_epochs else 'update'
    _logger.info(f'Scheduled epochs: {num_epochs}. LR stepped per {stepped}.')
    return scheduler, num_epochs


def epochs_to_train(num_epochs: int, stop_epoch: Optional[int], save_epochs: Sequence[int]) -> int:
    """Number of epochs after which training stops.

    Args:
        num_epochs: Epochs of the schedule, with those of warm-up and cool-down that it adds to --epochs.
        stop_epoch: Number of epochs after which to stop before the end of the schedule.
        save_epochs: Numbers of epochs after which a state is kept.

    Raises:
        ValueError: A number lies behind the end of the schedule.
    """
    given = [('--stop-epoch', stop_epoch or 0), *(('--save-epochs', epoch) for epoch in save_epochs)]
    behind = next(((flag, epoch) for flag, epoch in given if epoch > num_epochs), None)
    if behind is not None:
        raise ValueError(
            f'{behind[0]}: expected at most {num_epochs}, the epochs of the schedule, got {behind[1]}. Raise --epochs.'
        )
    if stop_epoch is not None and stop_epoch < num_epochs:
        _logger.info(f'Training stops after {stop_epoch} of {num_epochs} epochs. --resume auto trains the rest.')
        return stop_epoch
    return num_epochs


def clip_gradients(
    settings: OptimizationSettings,
    accelerator: Accelerator,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Clip the gradients of the task's parameters, in mode agc without the classifier."""
    if settings.clip_grad is None:
        return
    parameters = list(task.get_clip_parameters(exclude_head='agc' in settings.clip_mode))
    if settings.clip_mode == 'norm':
        accelerator.clip_grad_norm_(parameters, settings.clip_grad)
    else:
        accelerator.unscale_gradients(optimizer)
        dispatch_clip_grad(parameters, value=settings.clip_grad, mode=settings.clip_mode)
