"""The first lines of the log, with what one needs to know when a run goes wrong"""

import logging
import platform
from typing import Any, Dict, List, Optional, Sized, Tuple, cast

import accelerate
import timm
import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ...version import __version__
from ..data.datasets import Datasets
from ..data.labelled import count_labels

_logger = logging.getLogger(__name__)


def describe_versions() -> str:
    """Versions of this package and of those that decide what a run computes."""
    versions = dict(
        timm_coretune=__version__,
        timm=timm.__version__,
        torch=torch.__version__,
        accelerate=accelerate.__version__,
        python=platform.python_version(),
    )
    return ', '.join(f'{name} {version}' for name, version in versions.items())


def describe_counts(name: str, counts: Optional[List[int]], num_images: int, num_classes: Optional[int]) -> str:
    """Describe the number of images and classes of a split in one line."""
    if not counts:
        what = f'{num_classes} classes' if num_classes else 'classes unknown before they are read'
        return f'{name}: {num_images} images, {what}'
    return f'{name}: {num_images} images of {len(counts)} classes, {min(counts)} to {max(counts)} a class'


def log_data(datasets: Datasets) -> None:
    """Log the number of images and classes of both splits."""
    for name, dataset in (('Training', datasets.train), ('Validation', datasets.validation)):
        if dataset is not None:
            num_images = len(cast(Sized, dataset))
            _logger.info(describe_counts(name, count_labels(dataset), num_images, datasets.num_classes))


def _learning_rates(scheduler: Any, optimizer: torch.optim.Optimizer, t: int) -> Optional[List[float]]:
    try:
        values = scheduler._get_lr(t)
    except (AttributeError, AssertionError):  # no scheduler, or one that waits for metrics
        return None
    values = values if isinstance(values, (list, tuple)) else [values] * len(optimizer.param_groups)
    return [v * group.get('lr_scale', 1.0) for v, group in zip(values, optimizer.param_groups, strict=True)]


def log_update_size(batch_size: int, grad_accum_steps: int, num_processes: int, updates_per_epoch: int) -> None:
    """Log the number of images per update and of updates per epoch."""
    _logger.info(
        f'An update: {batch_size} images x {grad_accum_steps} batch(es) x {num_processes} process(es) = '
        f'{batch_size * grad_accum_steps * num_processes} images; {updates_per_epoch} updates an epoch.'
    )


def _warn_of_long_warmup(optimizer: torch.optim.Optimizer, scheduler: Any, end: int) -> None:
    """Warn if the learning rate is still rising when training ends. `end` is in the scheduler's unit of time."""
    if not 0 < end <= getattr(scheduler, 'warmup_t', 0):
        return
    unit = 'epochs' if scheduler.t_in_epochs else 'updates'
    reached = [scheduler.warmup_lr_init + (end - 1) * step for step in scheduler.warmup_steps]
    scales = [group.get('lr_scale', 1.0) for group in optimizer.param_groups]
    highest = max(lr * scale for lr, scale in zip(reached, scales, strict=True))
    asked = max(lr * scale for lr, scale in zip(scheduler.base_values, scales, strict=True))
    _logger.warning(
        f'Warm-up takes {scheduler.warmup_t} {unit}, the run has {end}: the learning rate only rises. The highest is '
        f'{highest:.3g}, not {asked:.3g}. Choose fewer --warmup-epochs, or more --epochs.'
    )


def log_average(average: Any, num_updates: int) -> None:
    """Warn before the first step if the moving average of the weights will hardly move.

    Args:
        average: timm's ModelEmaV3, None if there is no average.
        num_updates: Updates of the whole run. The first copies the weights.
    """
    if average is None or num_updates < 2:
        return
    kept = 1.0
    for update in range(2, num_updates + 1):
        kept *= average.get_decay(update)
        if kept <= 0.1:
            return
    fitting = 1 - float(f'{1 - 0.01 ** (1 / num_updates):.2g}')
    _logger.warning(
        f'The moving average of the weights will still hold {100 * kept:.3g} % of those after the first of '
        f'{num_updates} updates, by its decay of {average.decay}. --model-ema-decay {fitting:.8g} '
        'leaves about 1 % of them, and --model-ema-warmup starts with a lower decay.'
    )


def log_optimization(
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    num_epochs: int,
    updates_per_epoch: int,
) -> None:
    """Log the first, middle and last learning rate of every parameter group, and how much is frozen."""
    per_epoch = scheduler is None or scheduler.t_in_epochs
    end = num_epochs if per_epoch else num_epochs * updates_per_epoch
    moments = [_learning_rates(scheduler, optimizer, t) for t in (0, end // 2, max(end - 1, 0))]
    known = [moment for moment in moments if moment is not None]
    rates: Dict[Tuple[float, ...], int] = {}
    for index, group in enumerate(optimizer.param_groups):
        key = (group['lr'],) if len(known) < len(moments) else tuple(moment[index] for moment in known)
        rates[key] = rates.get(key, 0) + sum(p.numel() for p in group['params'])
    for key, count in sorted(rates.items(), reverse=True)[:12]:
        _logger.info(f'LR of {count:,} parameters: {", ".join(f"{lr:.3g}" for lr in key)} (first, middle, last).')
    if len(rates) > 12:
        _logger.info(f'LR of {len(rates) - 12} more groups below these.')
    _warn_of_long_warmup(optimizer, scheduler, end)
    # not those of a copy that the loss keeps
    total = [p for p in unwrap_model(task.get_eval_model()).parameters() if not p.requires_grad]
    if total:
        _logger.info(f'Frozen: {sum(p.numel() for p in total):,} parameters in {len(total)} tensors.')
