"""Order and augmentation of the training images, as functions of the seed and of the place in the run

timm's loaders draw both from generators that run on from epoch to epoch, one in each process and each loader worker. To
continue such a run in the middle of an epoch all of them would have to be saved. Here every image and every batch has a
key, made of the seed, the epoch and its place in the epoch, and whoever augments it seeds his generators with the key.
So nothing is saved, the number of workers does not matter, and neither does the number of processes.
"""

import contextlib
import hashlib
import math
import random
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info


def make_key(*numbers: int) -> int:
    """A seed that looks unrelated for any change of the numbers, in [0, 2**63)."""
    digest = hashlib.blake2b(b'%d,' * len(numbers) % numbers, digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_generators(key: int, device: Optional[torch.device] = None) -> None:
    """Seed Python, NumPy, and torch on the CPU and on an accelerator if one is given."""
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002, timm draws from this generator
    torch.default_generator.manual_seed(key)
    if device is not None and device.type != 'cpu':
        getattr(torch, device.type).manual_seed(key)


@contextlib.contextmanager
def seeded(key: int, device: Optional[torch.device] = None) -> Iterator[None]:
    """Draw from key inside. In a loader worker, which draws nothing else, the generators are not put back."""
    if get_worker_info() is not None:
        seed_generators(key)
        yield
        return
    accelerator = [] if device is None or device.type == 'cpu' else [device]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(accelerator, device_type=accelerator[0].type if accelerator else 'cuda'):
        seed_generators(key, device)
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002


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
        order = getattr(batch_sampler, 'sampler', None)
        if hasattr(order, 'seed'):
            order.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def skip(self, num_batches: int) -> None:
        """Leave out the first batches of the next pass."""
        self.num_skipped = num_batches

    def _shuffle(self, epoch: int) -> None:
        order = getattr(self.batches, 'sampler', None)
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
        return len(self.batches)


class SeededDataset(Dataset):
    """Loads the indices of an EpochBatchSampler, each under its own seed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, item: Tuple[Draw, Any]) -> Tuple[Draw, Any]:
        draw, index = item
        with seeded(draw.key):
            return draw, self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


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


class ClassBalancedBatchSampler(Sampler):
    """Batches in which each class that appears does so at least twice, so that every image has a positive.

    An image appears once an epoch, as without it; only the company it is in changes. A class goes into batches in twos
    (the last three images of an odd class together), a class of one image goes alone. Where a place is left that no
    group fits into, an image of a class that is in the batch already fills it.

    Args:
        labels: Class of every image.
        batch_size: Images of one process.
        rank: Index of this process.
        num_processes: Processes that mine together; what is said of a batch holds for all their images.
        seed: Seed of the run.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, rank: int, num_processes: int, seed: int):
        self.members = {}
        for index, label in enumerate(labels):
            self.members.setdefault(label, []).append(index)
        self.labels = labels
        self.batch_size = batch_size
        self.rank = rank
        self.num_processes = num_processes
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels) // (self.batch_size * self.num_processes)

    def _groups(self, draws: random.Random) -> List[List[int]]:
        groups = []
        for members in self.members.values():
            members = draws.sample(members, len(members))
            num_groups = max(1, len(members) // 2)
            groups += [members[2 * i : 2 * i + 2] for i in range(num_groups - 1)] + [members[2 * num_groups - 2 :]]
        draws.shuffle(groups)
        return groups

    def _with_company(self, batch: List[int], draws: random.Random) -> int:
        return draws.choice([index for index in batch if len(self.members[self.labels[index]]) > 1] or batch)

    def __iter__(self) -> Iterator[List[int]]:
        draws = random.Random(make_key(self.seed, self.epoch))
        groups = self._groups(draws)
        size = self.batch_size * self.num_processes
        for _ in range(len(self)):
            batch, waiting = [], []
            groups = groups or self._groups(draws)
            while len(batch) < size:
                room = size - len(batch)
                if groups and len(groups[-1]) <= room:
                    batch += groups.pop()
                elif groups and len(waiting) < 8:
                    waiting.append(groups.pop())
                elif batch:
                    batch.append(draws.choice(self.members[self.labels[self._with_company(batch, draws)]]))
                else:
                    batch += waiting.pop()[:room]
            groups += reversed(waiting)
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


def expected_positives(
    counts: Sequence[int],
    batch_size: int,
) -> Tuple[float, float]:
    """Positives an image can expect in a batch drawn without replacement, and the share of images without any.

    Args:
        counts: Images of each class.
        batch_size: Images in a batch over all processes.

    Returns:
        Mean over the images of a batch of the expected number of other images of their class, and of the probability
        that there is none.
    """
    total = sum(counts)
    if total < 2:
        return 0.0, 1.0
    drawn = min(batch_size, total) - 1

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    positives = alone = 0.0
    for count in filter(None, counts):
        positives += count / total * drawn * (count - 1) / (total - 1)
        if total - count >= drawn:
            alone += count / total * math.exp(log_choose(total - count, drawn) - log_choose(total - 1, drawn))
    return positives, alone


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
