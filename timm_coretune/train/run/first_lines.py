"""The first lines of the log, with what one needs to know when a run goes wrong"""

import logging
from typing import Any, Dict, List, Optional, Sized, Tuple, cast

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..data.datasets import Datasets, count_labels

_logger = logging.getLogger(__name__)


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
    total = [p for p in unwrap_model(task.get_trainable_module()).parameters() if not p.requires_grad]
    if total:
        _logger.info(f'Frozen: {sum(p.numel() for p in total):,} parameters in {len(total)} tensors.')
