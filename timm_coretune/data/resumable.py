"""Loaders whose order and augmentation of images depend only on the seed and on the place in the run

timm's loaders draw both from generators that run on from epoch to epoch, one in each process and each loader worker. To
continue such a run in the middle of an epoch, all of these generators would have to be saved. Here every image and
every batch has a key, made of the seed, the epoch and its place in the epoch. Generators are seeded with it before an
image is augmented. Nothing has to be saved, and the number of workers does not matter. Neither does the number of
processes, but for what acts on the batch of a process: pixel mixup and random erasing.
"""

import itertools
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Sized, Tuple, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from .seeding import make_key, seeded


class Draw(NamedTuple):
    """Determines the augmentation of an image or a batch.

    Attributes:
        epoch: Epoch in which it is used.
        key: Seed of its random draws.
    """

    epoch: int
    key: int


class EpochBatchSampler(Sampler):
    """Yields batches in an order that depends only on seed and epoch. Each index comes with the Draw of its image.

    With DistributedSampler, or one process and RandomSampler, an epoch has the same global batches for any number of
    processes, and the augmentation of an image is the same.

    Args:
        batch_sampler: Sampler that yields batches of indices for this process.
        seed: Seed of the run.
        rank: Index of this process.
        num_processes: Processes that train together.
    """

    def __init__(self, batch_sampler: Sampler, seed: int, rank: int, num_processes: int):
        self.batches = batch_sampler
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = 0
        self.num_skipped = 0
        order: Any = getattr(batch_sampler, 'sampler', None)
        if hasattr(order, 'seed'):
            order.seed = seed
        self.num_batches = len(cast(Sized, batch_sampler))
        if isinstance(order, DistributedSampler) and getattr(batch_sampler, 'drop_last', False):
            # the sampler repeats images, so that processes have equally many; one process has no batch of such images
            size: int = batch_sampler.batch_size  # type: ignore[attr-defined]
            self.num_batches = len(cast(Sized, order.dataset)) // (size * num_processes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def skip(self, num_batches: int) -> None:
        """Skip the first batches of the next pass."""
        self.num_skipped = num_batches

    def _shuffle(self, epoch: int) -> None:
        order: Any = getattr(self.batches, 'sampler', None)
        part: Any
        for part in (self.batches, order):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        if isinstance(order, torch.utils.data.RandomSampler):
            # the same seed that DistributedSampler uses
            order.generator = torch.Generator().manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[List[Tuple[Draw, Any]]]:
        epoch, num_skipped, place = self.epoch, self.num_skipped, 0
        self.num_skipped = 0
        self._shuffle(epoch)
        for number, batch in enumerate(itertools.islice(self.batches, self.num_batches)):
            first, place = place, place + len(batch)
            if number >= num_skipped:
                places = range(first * self.num_processes + self.rank, place * self.num_processes, self.num_processes)
                yield [
                    (Draw(epoch, make_key(self.seed, epoch, i)), index) for i, index in zip(places, batch, strict=True)
                ]
        # loaders that never end start the next epoch before set_epoch is called
        self.epoch = epoch + 1

    def __len__(self) -> int:
        return self.num_batches


class SeededDataset(Dataset):
    """Loads the images of an EpochBatchSampler, each under its own seed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, item: Tuple[Draw, Any]) -> Tuple[Draw, Any]:
        draw, index = item
        with seeded(draw.key):
            return draw, self.dataset[index]

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))


class SeededCollate:
    """Collates a batch under a seed of its own, since collating may draw the shares of pixel mixup.

    Args:
        collate_fn: Function that makes a batch of samples, such as timm's FastCollateMixup.
        mixup_off_epoch: First epoch without pixel mixup, 0 for never. It is set in advance, since loader workers that
            live from epoch to epoch do not see later changes of attributes.
    """

    def __init__(self, collate_fn: Callable, mixup_off_epoch: int = 0):
        self.collate_fn = collate_fn
        self.mixup_off_epoch = mixup_off_epoch

    def __call__(self, batch: Sequence[Tuple[Draw, Any]]) -> Any:
        draw = batch[0][0]
        if self.mixup_off_epoch and hasattr(self.collate_fn, 'mixup_enabled'):
            self.collate_fn.mixup_enabled = draw.epoch < self.mixup_off_epoch
        with seeded(make_key(draw.key)):
            return self.collate_fn([sample for _, sample in batch])


class SeededErasing:
    """Random erasing on the device, as in timm's prefetching loader, under a seed for every batch.

    Args:
        erasing: timm's RandomErasing.
        seed: Seed of the run.
        rank: Index of this process.
    """

    def __init__(self, erasing: Callable, seed: int, rank: int):
        self.erasing = erasing
        self.seed = seed
        self.rank = rank
        self.start(0, 0)

    def start(self, epoch: int, batch: int) -> None:
        self.epoch = epoch
        self.batch = batch

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        with seeded(make_key(self.seed, self.rank, self.epoch, self.batch), input.device):
            input = self.erasing(input)
        self.batch += 1
        return input


def make_resumable(
    loader: Any,
    seed: int,
    rank: int,
    num_processes: int,
    batch_sampler: Optional[Sampler] = None,
    mixup_off_epoch: int = 0,
) -> Any:
    """Make a training loader depend only on seed and epoch, and start at any batch.

    Args:
        loader: Loader from timm's create_loader, or torch's, of a data set with indices.
        seed: Seed of the run.
        rank: Index of this process.
        num_processes: Processes that train together.
        batch_sampler: Replaces the loader's own batch sampler.
        mixup_off_epoch: First epoch without pixel mixup in the loader, 0 for never.

    Returns:
        A loader of the same kind.
    """
    inner = getattr(loader, 'loader', loader)
    if batch_sampler is None:
        batch_sampler = inner.batch_sampler
        if not isinstance(batch_sampler, Sampler):
            batch_sampler = batch_sampler.sampler  # timm's multi-epochs loader wraps it
    resumable: DataLoader = type(inner)(
        SeededDataset(inner.dataset),
        batch_sampler=EpochBatchSampler(batch_sampler, seed, rank, num_processes),
        collate_fn=SeededCollate(inner.collate_fn, mixup_off_epoch),
        num_workers=inner.num_workers,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        persistent_workers=inner.persistent_workers,
    )
    if inner is loader:
        return resumable
    loader.loader = resumable
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing, seed, rank)
    return loader
