"""Feeds batches to the model: from any batch of an epoch, equally many on all processes, on the device"""

import itertools
import logging
from typing import Any, Dict, Iterator, Optional, Sized, Tuple, Union, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ...data.resumable import EpochBatchSampler, SeededErasing

_logger = logging.getLogger(__name__)

Input = Union[torch.Tensor, Dict[str, Any]]
# samplers that know nothing of processes
_WHOLE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


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


def is_resumable(loader: Any) -> bool:
    """Whether `make_resumable` made this loader."""
    return isinstance(_order_of(loader), EpochBatchSampler)


def is_even(loader: Any, accelerator: Accelerator) -> bool:
    """Whether all processes are known to have equally many batches."""
    return accelerator.num_processes == 1 or is_resumable(loader)


def count_batches(loader: Any, accelerator: Accelerator) -> int:
    """Number of batches per epoch that every process expects to have."""
    if is_even(loader, accelerator):
        return len(loader)
    return int(accelerator.gather(torch.tensor([len(loader)], device=accelerator.device)).min())


def count_shared(loader: Any, accelerator: Accelerator) -> int:
    """Number of validation batches that every process is sure to have: of a stream in several processes none."""
    dataset = getattr(getattr(loader, 'loader', loader), 'dataset', None)  # under a prefetching loader
    if accelerator.num_processes > 1 and isinstance(dataset, IterableDataset):
        return 0
    return count_batches(loader, accelerator)


class _HaveAll:
    """Asks all processes whether each has a batch. The answer is on its way while the device computes something else.

    Args:
        has_one: Whether this process has a batch.
        accelerator: The processes.
    """

    def __init__(self, has_one: bool, accelerator: Accelerator):
        self.num_processes = accelerator.num_processes
        # torch.tensor would copy a number to the device, and wait for that
        count = torch.full((), float(has_one), device=accelerator.device)
        total = cast(torch.Tensor, accelerator.reduce(count, 'sum'))
        self.total = total.to('cpu', non_blocking=True)
        self.arrival: Any = None
        if total.device.type != 'cpu':
            self.arrival = getattr(torch, total.device.type).Event()
            self.arrival.record()

    def __bool__(self) -> bool:
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.total.item() == self.num_processes


def in_step(batches: Iterator[Any], loader: Any, accelerator: Accelerator) -> Iterator[Any]:
    """End on all processes when the first runs out of batches, since the others would wait for it forever.

    The processes are asked about a batch before the step of the batch before it, so that the device has that step to
    compute while this process waits for the answer.
    """
    if is_even(loader, accelerator):
        yield from batches
        return
    batch = next(batches, None)
    have_all = _HaveAll(batch is not None, accelerator)
    for number in itertools.count():
        if not have_all:
            if batch is not None:
                _logger.warning(f'Another process ran out of batches after {number}, leaving out the rest.')
            return
        following = next(batches, None)
        have_all = _HaveAll(following is not None, accelerator)
        yield batch
        batch = following


def _count_shared(num_images: int, share: Any, loader: Any, accelerator: Accelerator) -> int:
    """Number of images that accelerate deals to this process, without those that it repeats to fill the last batches.

    The batches of all processes, side by side in the order of the processes, are the data set from front to back.
    """
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    is_split = getattr(share, 'split_batches', getattr(loader, 'split_batches', False))
    num_at_once = share.batch_size * (1 if is_split else num_processes)  # images of a batch over all processes
    rounds, rest = divmod(num_images, num_at_once)
    size = last_size = num_at_once // num_processes
    if not isinstance(share, BatchSamplerShard):  # the main process reads, and deals out what is left evenly
        last_size = -(-rest // num_processes)
    return rounds * size + min(max(rest - rank * last_size, 0), last_size)


def num_own_samples(loader: Any, accelerator: Accelerator) -> Optional[int]:
    """Number of images to count in this process, so that a validation counts each image once over all processes.

    They are the first that the loader yields; those after them are repetitions, or images of another process. With a
    loader that nobody shared out, every process reads all images, and the main process counts them.

    Args:
        loader: A validation loader of torch or timm, or one that accelerate prepared.
        accelerator: The processes.

    Returns:
        The number, or None to count all.

    Raises:
        ValueError: It cannot be told which images this process has, or some are left out.
    """
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if num_processes == 1:
        return None
    inner = getattr(loader, 'loader', loader)  # under a prefetching loader
    dataset: Any = getattr(inner, 'dataset', None)
    is_prepared = isinstance(inner, (DataLoaderShard, DataLoaderDispatcher))
    if isinstance(dataset, IterableDataset):
        if is_prepared:
            raise ValueError(
                'Expected to validate a stream as it is, got one that accelerate prepared, which repeats images. Leave '
                'it out of accelerator.prepare.'
            )
        return None
    share: Any = getattr(inner, 'batch_sampler', None)
    share = getattr(inner, 'sampler', None) if share is None else share
    order = share
    while getattr(order, 'batch_sampler', getattr(order, 'sampler', None)) is not None:
        order = getattr(order, 'batch_sampler', getattr(order, 'sampler', None))
    is_shared = hasattr(order, 'num_replicas')
    leaves_out = getattr(share, 'drop_last', False) or (is_shared and getattr(order, 'drop_last', False))
    if leaves_out and (is_prepared or is_shared):
        raise ValueError(
            f'Expected a validation loader that reads all images, got one that leaves out the last of each of '
            f'{num_processes} processes. Create it with drop_last=False.'
        )
    if is_prepared and not is_shared:
        if not getattr(share, 'even_batches', True):
            return None
        if getattr(share, 'batch_size', None) is not None:
            return _count_shared(len(cast(Sized, order)), share, inner, accelerator)
    elif isinstance(order, (OrderedDistributedSampler, DistributedSampler)) and not is_prepared:
        found = (order.num_replicas, order.rank)
        if found != (num_processes, rank):
            raise ValueError(
                f'Expected a validation loader for process {rank} of {num_processes}, got one for process {found[1]} '
                f'of {found[0]}. Create its sampler with num_replicas={num_processes}, rank={rank}.'
            )
        num_images = len(cast(Sized, order.dataset))
        if len(order) == -(-num_images // num_processes):
            return len(range(rank, num_images, num_processes))
    elif isinstance(order, _WHOLE) or (not is_shared and order is not None and len(order) == len(dataset)):
        _logger.info(
            'Every process reads all validation images, and the main process counts them. To share them, prepare the '
            'loader by accelerate.'
        )
        return None if rank == 0 else 0
    raise ValueError(
        'Expected a validation loader that is plain, prepared by accelerate, or has a DistributedSampler, to count '
        f'each image once in {num_processes} processes. Got {type(loader).__name__} with {type(order).__name__}'
        f'{", which accelerate prepared on top of that" if is_prepared else ""}. Pass the plain loader, or '
        'accelerator.prepare(loader).'
    )


def to_device(
    batch: Tuple[Input, torch.Tensor],
    device: torch.device,
    channels_last: bool = False,
    dtype: Optional[torch.dtype] = None,
) -> Tuple[Input, torch.Tensor]:
    """Move images (or a dictionary of NaFlex patches) and labels to the device, unless the loader has done so."""
    return input_to_device(batch[0], device, channels_last, dtype), batch[1].to(device, non_blocking=True)


def input_to_device(
    input: Input, device: torch.device, channels_last: bool = False, dtype: Optional[torch.dtype] = None
) -> Input:
    """Move images or a dictionary of patches to the device, unless they are there."""
    if isinstance(input, dict):
        moved = {k: v.to(device, non_blocking=True) for k, v in input.items() if isinstance(v, torch.Tensor)}
        return {**input, **moved}
    input = input.to(device, dtype=dtype, non_blocking=True)
    return input.contiguous(memory_format=torch.channels_last) if channels_last else input
