"""Order and augmentation of the training images, as functions of the seed and of the place in the run

timm's loaders draw both from generators that run on from epoch to epoch, one in each process and each loader worker. To
continue such a run in the middle of an epoch all of them would have to be saved. Here every image and every batch has a
key, made of the seed, the epoch and its place in the epoch, and whoever augments it seeds his generators with the key.
So nothing is saved, the number of workers does not matter, and neither does the number of processes.
"""

from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Sized, Tuple, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .seeding import make_key, seeded


class Draw(NamedTuple):
    """What an image or a batch is augmented by.

    Attributes:
        epoch: Epoch it is loaded for.
        key: Seed of its random draws.
    """

    epoch: int
    key: int


class EpochBatchSampler(Sampler):
    """Batches in an order that depends on seed and epoch alone, each index with the draw of its image.

    With DistributedSampler, or one process and RandomSampler, the images of a global batch are the same for any number
    of processes, and so is their augmentation.

    Args:
        batch_sampler: Batches of indices for this process.
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

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def skip(self, num_batches: int) -> None:
        """Leave out the first batches of the next pass."""
        self.num_skipped = num_batches

    def _shuffle(self, epoch: int) -> None:
        order: Any = getattr(self.batches, 'sampler', None)
        part: Any
        for part in (self.batches, order):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        if isinstance(order, torch.utils.data.RandomSampler):
            # as DistributedSampler seeds itself
            order.generator = torch.Generator().manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[List[Tuple[Draw, Any]]]:
        epoch, num_skipped, place = self.epoch, self.num_skipped, 0
        self.num_skipped = 0
        self._shuffle(epoch)
        for number, batch in enumerate(self.batches):
            first, place = place, place + len(batch)
            if number >= num_skipped:
                places = range(first * self.num_processes + self.rank, place * self.num_processes, self.num_processes)
                yield [
                    (Draw(epoch, make_key(self.seed, epoch, i)), index) for i, index in zip(places, batch, strict=True)
                ]
        # loaders that never end ask for the next epoch before it is announced
        self.epoch = epoch + 1

    def __len__(self) -> int:
        return len(cast(Sized, self.batches))


class SeededDataset(Dataset):
    """Loads the indices of an EpochBatchSampler, each under its own seed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, item: Tuple[Draw, Any]) -> Tuple[Draw, Any]:
        draw, index = item
        with seeded(draw.key):
            return draw, self.dataset[index]

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))


class SeededCollate:
    """Makes a batch under a seed of its own, as pixel mixup draws while it does.

    Args:
        collate_fn: What makes batches, maybe timm's FastCollateMixup.
        mixup_off_epoch: Epoch from which on it does not mix, 0 for never. Told here, since loader workers that live on
            from epoch to epoch do not see attributes change.
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
    """Random erasing on the device, where timm's loader does it, under a seed for every batch.

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
    """Let a training loader of timm draw from seed and epoch, and start at any batch.

    Args:
        loader: What timm's create_loader returned, for a data set with indices.
        seed: Seed of the run.
        rank: Index of this process.
        num_processes: Processes that train together.
        batch_sampler: In place of the loader's own.
        mixup_off_epoch: Epoch from which on pixel mixup in the loader is off, 0 for never.

    Returns:
        The same kind of loader.
    """
    inner = getattr(loader, 'loader', loader)
    if batch_sampler is None:
        batch_sampler = inner.batch_sampler
        if not isinstance(batch_sampler, Sampler):
            batch_sampler = batch_sampler.sampler  # timm's loader of many epochs wraps it
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
