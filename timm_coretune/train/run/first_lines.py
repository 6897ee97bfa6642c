"""The first lines of the log: what people otherwise ask about a run that goes wrong"""

import argparse
import logging
import math
from collections import Counter
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..data.class_balance import expected_positives
from ..data.datasets import Datasets, get_labels

_logger = logging.getLogger(__name__)


def describe_counts(name: str, counts: Optional[List[int]], num_images: int, num_classes: Optional[int]) -> str:
    """Images and classes of a split in a few words."""
    if not counts:
        what = f'{num_classes} classes' if num_classes else 'classes unknown before they are read'
        return f'{name}: {num_images} images, {what}'
    return f'{name}: {num_images} images of {len(counts)} classes, {min(counts)} to {max(counts)} a class'


def _class_counts(dataset: Any) -> Optional[List[int]]:
    labels = get_labels(dataset)
    return None if labels is None else list(Counter(labels).values())


def log_data(datasets: Datasets) -> None:
    """Images and classes of both splits."""
    for name, dataset in (('Training', datasets.train), ('Validation', datasets.validation)):
        if dataset is not None:
            _logger.info(describe_counts(name, _class_counts(dataset), len(dataset), datasets.num_classes))


def log_contrast(args: argparse.Namespace, datasets: Datasets, num_processes: int) -> None:
    """The batch that is contrasted, what an image finds in it, and where the contrastive loss starts."""
    num_gathered = 1 if args.no_coretune_gather else num_processes
    batch_size = args.batch_size * num_gathered
    if args.segmentation:
        num_anchors = batch_size * args.anchors_per_image
        _logger.info(
            f'Contrast over up to {num_anchors} pixels ({args.anchors_per_image} an image x {args.batch_size} images x '
            f'{num_gathered} process(es)): at chance its loss without the focal factor is ln {num_anchors + 1} = '
            f'{math.log(num_anchors + 1):.2f}.'
        )
        return
    # beside the other images an anchor sees its own hard positive and semi-hard negative
    chance = math.log(batch_size + 1)
    message = (
        f'Contrast over {batch_size} images ({args.batch_size} x {num_gathered} process(es); accumulation does not '
        f'enlarge it): at chance its loss without the focal factor is ln {batch_size + 1} = {chance:.2f}.'
    )
    counts = _class_counts(datasets.train)
    if counts:
        if args.class_balance:
            alone = counts.count(1) / sum(counts)
            message += f' A class in a batch is there at least twice; {100 * alone:.1f} % of the images have no other.'
        else:
            positives, alone = expected_positives(counts, batch_size)
            message += (
                f' An image finds {positives:.1f} positives on average, {100 * alone:.1f} % of the images find none '
                'but their mixture.'
            )
        if batch_size < 2 * len(counts) and not args.class_balance:
            _logger.warning(
                f'A batch of {batch_size} is less than twice the {len(counts)} classes: many images find no positive. '
                'Consider a larger --batch-size, or --class-balance.'
            )
    _logger.info(message)


def _learning_rates(scheduler: Any, optimizer: torch.optim.Optimizer, t: int) -> Optional[List[float]]:
    try:
        values = scheduler._get_lr(t)
    except (AttributeError, AssertionError):  # none, or one that waits for metrics
        return None
    values = values if isinstance(values, (list, tuple)) else [values] * len(optimizer.param_groups)
    return [v * group.get('lr_scale', 1.0) for v, group in zip(values, optimizer.param_groups, strict=True)]


def log_optimization(
    args: argparse.Namespace,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    num_epochs: int,
    updates_per_epoch: int,
    num_processes: int,
) -> None:
    """The size of an update, and the first, middle and last learning rate of every group of parameters."""
    _logger.info(
        f'An update: {args.batch_size} images x {args.grad_accum_steps} batch(es) x {num_processes} process(es) = '
        f'{args.batch_size * args.grad_accum_steps * num_processes} images; {updates_per_epoch} updates an epoch.'
    )
    per_epoch = scheduler is None or scheduler.t_in_epochs
    end = num_epochs if per_epoch else num_epochs * updates_per_epoch
    moments = [_learning_rates(scheduler, optimizer, t) for t in (0, end // 2, max(end - 1, 0))]
    rates: Dict[Tuple[float, ...], int] = {}
    for index, group in enumerate(optimizer.param_groups):
        first = group['lr']
        key = (first,) if None in moments else tuple(moment[index] for moment in moments)
        rates[key] = rates.get(key, 0) + sum(p.numel() for p in group['params'])
    for key, count in sorted(rates.items(), reverse=True)[:12]:
        _logger.info(f'LR of {count:,} parameters: {", ".join(f"{lr:.3g}" for lr in key)} (first, middle, last).')
    if len(rates) > 12:
        _logger.info(f'LR of {len(rates) - 12} more groups below these.')
    total = [p for p in unwrap_model(task.get_trainable_module()).parameters() if not p.requires_grad]
    if total:
        _logger.info(f'Frozen: {sum(p.numel() for p in total):,} parameters in {len(total)} tensors.')
