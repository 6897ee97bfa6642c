"""Class-balanced batches, and the number of positives that an image can expect in batches without balance"""

import math
import random
from typing import Dict, Iterator, List, Sequence, Tuple

from torch.utils.data import Sampler

from .seeding import make_key


class ClassBalancedBatchSampler(Sampler):
    """Batches in which each class that appears does so at least twice, so that every image has a positive.

    As in plain shuffling, an epoch has every image once; only the batch it is in changes. The images of a class go into
    batches in pairs, the last three together if their number is odd. A class of one image goes alone. If a place is
    left that no group fits into, an extra image of a class in the batch fills it.

    Args:
        labels: Class of every image.
        batch_size: Images per batch and process.
        rank: Index of this process.
        num_processes: Number of processes that mine together. Classes are balanced over the batches of all of them.
        seed: Seed of the run.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, rank: int, num_processes: int, seed: int):
        self.members: Dict[int, List[int]] = {}
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
            batch: List[int] = []
            waiting: List[List[int]] = []
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
            yield batch[self.rank :: self.num_processes]  # as DistributedSampler shares images out


def expected_positives(
    counts: Sequence[int],
    batch_size: int,
) -> Tuple[float, float]:
    """Number of positives an image can expect in a randomly drawn batch, and the share of images without any.

    Args:
        counts: Number of images of each class.
        batch_size: Number of images in a batch, over all processes.

    Returns:
        The expected number of other images of the same class in the batch, and the probability that there is none. Both
        are means over the images. The batch is drawn without replacement.
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
