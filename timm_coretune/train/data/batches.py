"""Feeds batches to the model: from any batch of an epoch, equally many on all processes, on the device"""

import itertools
import logging
from typing import Any, Dict, Iterator, Optional, Tuple, Union

import torch
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from ...data.resumable import EpochBatchSampler, SeededErasing

_logger = logging.getLogger(__name__)

Input = Union[torch.Tensor, Dict[str, Any]]


def _order_of(loader: Any) -> Any:
    """The sampler that orders the batches of a loader, taken out of the wrappers that torch and timm put around it."""
    sampler = getattr(getattr(loader, 'loader', loader), 'batch_sampler', None)  # under a prefetching loader
    return sampler if isinstance(sampler, EpochBatchSampler) else getattr(sampler, 'sampler', sampler)


def batches_from(loader: Any, epoch: int, start: int = 0) -> Iterator[Any]:
    """The batches of an epoch from batch `start` on.

    A resumable loader starts there. Any other has to read the batches before, and its later ones may then differ.
    """
    sampler = _order_of(loader)
    part: Any
    for part in (getattr(loader, 'dataset', None), sampler, getattr(loader, 'sampler', None)):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    if isinstance(sampler, EpochBatchSampler):
        sampler.skip(start)
        erasing = getattr(loader, 'random_erasing', None)
        if isinstance(erasing, SeededErasing):
            erasing.start(epoch, start)
        inner = getattr(loader, 'loader', loader)
        if hasattr(inner, 'iterator'):  # timm's multi-epochs loader: restart it unless its next batch is the right one
            if start or getattr(inner, 'next_epoch', None) != epoch:
                inner.iterator = DataLoader.__iter__(inner)
            inner.next_epoch = None if start else epoch + 1
        return itertools.islice(loader, len(loader) - start)
    if start:
        _logger.warning(
            f'This data set cannot start in the middle of an epoch: reading {start} batches to where the run stopped. '
            'The batches after them may be others than those of an uninterrupted run.'
        )
    return itertools.islice(loader, start, None)


def has_plain_order(loader: Any) -> bool:
    """Whether the order of the images is the same for any batch size and number of processes."""
    batches: Any = getattr(_order_of(loader), 'batches', None)
    order = getattr(batches, 'sampler', None)
    return isinstance(batches, BatchSampler) and isinstance(order, (RandomSampler, DistributedSampler))


def is_even(loader: Any, accelerator: Accelerator) -> bool:
    """Whether all processes are known to have equally many batches."""
    return accelerator.num_processes == 1 or isinstance(_order_of(loader), EpochBatchSampler)


def count_batches(loader: Any, accelerator: Accelerator) -> int:
    """Number of batches per epoch that every process expects to have."""
    if is_even(loader, accelerator):
        return len(loader)
    return int(accelerator.gather(torch.tensor([len(loader)], device=accelerator.device)).min())


def in_step(batches: Iterator[Any], loader: Any, accelerator: Accelerator) -> Iterator[Any]:
    """End on all processes when the first runs out of batches, since the others would wait for it forever."""
    if is_even(loader, accelerator):
        yield from batches
        return
    for number in itertools.count():
        batch = next(batches, None)
        have_one = torch.tensor(float(batch is not None), device=accelerator.device)
        if accelerator.reduce(have_one, 'sum').item() < accelerator.num_processes:
            if batch is not None:
                _logger.warning(f'Another process ran out of batches after {number}, leaving out the rest.')
            return
        yield batch


def num_own_samples(loader: Any, accelerator: Accelerator) -> Optional[int]:
    """Number of validation images of this process, without a sampler's repetitions. None if nothing is repeated."""
    if accelerator.num_processes == 1 or isinstance(getattr(loader, 'dataset', None), IterableDataset):
        return None
    return len(range(accelerator.process_index, len(loader.dataset), accelerator.num_processes))


def to_device(
    batch: Tuple[Input, torch.Tensor],
    device: torch.device,
    channels_last: bool = False,
    dtype: Optional[torch.dtype] = None,
) -> Tuple[Input, torch.Tensor]:
    """Move images (or a dictionary of NaFlex patches) and labels to the device, unless the loader has done so."""
    input, target = batch[0], batch[1].to(device, non_blocking=True)
    if isinstance(input, dict):
        moved = {k: v.to(device, non_blocking=True) for k, v in input.items() if isinstance(v, torch.Tensor)}
        return {**input, **moved}, target
    input = input.to(device, dtype=dtype, non_blocking=True)
    return (input.contiguous(memory_format=torch.channels_last) if channels_last else input), target
