"""The global batch: rows of all processes, gathered with gradient

Every process computes the loss of its own rows against the rows of all. The gradient that a process' rows receive from
the losses of the others is summed in the backward pass, so the average that DistributedDataParallel (or FSDP) takes
over processes is exactly the gradient of one process with the whole batch.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


def process_index_and_count() -> Tuple[int, int]:
    """Rank of this process, and how many train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _all_gather(x: torch.Tensor) -> torch.Tensor:
    gathered = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
    # torch 2.14 renamed the collectives on single tensors
    gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
    gather(gathered, x.contiguous())
    return gathered


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over processes, without gradient."""
    if process_index_and_count()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


class _AllGather(torch.autograd.Function):
    """Concatenates equal numbers of rows in rank order; the backward sums over processes, as all use the rows."""

    @staticmethod
    def forward(ctx, x):
        return _all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        num_rows = grad.shape[0] // dist.get_world_size()
        if dist.get_backend() == 'gloo':  # older gloo has no reduce-scatter of one tensor
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad)
            return grad.narrow(0, dist.get_rank() * num_rows, num_rows)
        own = grad.new_empty((num_rows, *grad.shape[1:]))
        scatter = getattr(dist, 'reduce_scatter_single', None) or dist.reduce_scatter_tensor
        scatter(own, grad.contiguous())
        return own


@dataclass(frozen=True)
class GlobalBatch:
    """Where the rows of this process lie among those of all processes.

    Attributes:
        rank: Index of this process.
        sizes: Rows of every process, in rank order.
        rows_per_image: Rows that an image gives, which follow each other.
    """

    rank: int
    sizes: List[int]
    rows_per_image: int = 1

    @classmethod
    def create(
        cls,
        batch_size: int,
        gather: bool = True,
        uneven: bool = False,
        device: Optional[torch.device] = None,
        rows_per_image: int = 1,
    ) -> 'GlobalBatch':
        """Describe the batch of this step.

        Args:
            batch_size: Images of this process.
            gather: Use the rows of all processes; otherwise this process is on its own.
            uneven: Exchange the sizes, for loaders whose batches may differ between processes. Costs a synchronisation
                with the device; without it all processes must hold batch_size images.
            device: Where the process group exchanges tensors.
            rows_per_image: Rows that an image gives.
        """
        rank, num_processes = process_index_and_count()
        num_rows = batch_size * rows_per_image
        if not gather or num_processes == 1:
            return cls(0, [num_rows], rows_per_image)
        if not uneven:
            return cls(rank, [num_rows] * num_processes, rows_per_image)
        return cls(rank, _all_gather(torch.tensor([num_rows], device=device)).tolist(), rows_per_image)

    @property
    def num_rows(self) -> int:
        """Rows of all processes together."""
        return sum(self.sizes)

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    def mean(self, total: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The share of this process in the mean over all rows that count: its average over processes is that mean.

        Args:
            total: Sum over the rows of this process, a scalar.
            label: Class of the rows of all processes, negative for those that do not count (N,) int64.
        """
        return total * self.world_size / (label >= 0).sum().clamp(min=1)

    def own_rows(self, device: torch.device) -> torch.Tensor:
        """Indices of this process' rows among all (B,) int64."""
        start = sum(self.sizes[: self.rank])
        return torch.arange(start, start + self.sizes[self.rank], device=device)

    def reading_order(self, device: torch.device) -> Optional[torch.Tensor]:
        """Rows in the order of one process that reads the same data (N,) int64, None where they are in it.

        Image b of process r is image b * world_size + r there, as a distributed sampler deals images out. Draws that
        count rows in this order do not depend on the number of processes.
        """
        if self.world_size == 1:
            return None
        if min(self.sizes) == max(self.sizes):
            rows = torch.arange(self.num_rows, device=device)
            return rows.view(self.world_size, -1, self.rows_per_image).transpose(0, 1).flatten()
        places = [(row // self.rows_per_image, rank) for rank, size in enumerate(self.sizes) for row in range(size)]
        return torch.tensor(sorted(range(self.num_rows), key=places.__getitem__), device=device)

    def own_share(self, draws: torch.Tensor) -> torch.Tensor:
        """What one process would give to the rows that this one holds, of draws (>= N,) for all (B,)."""
        rank, num_processes = process_index_and_count()
        own = draws.view(-1, num_processes, self.rows_per_image)[:, rank].flatten()
        return own[: self.sizes[self.rank]]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of all processes in rank order (N, ...), differentiable in the own rows x (B, ...)."""
        if self.world_size == 1:
            return x
        largest = max(self.sizes)
        if min(self.sizes) == largest:
            return _AllGather.apply(x)
        padded = F.pad(x, [0, 0] * (x.ndim - 1) + [0, largest - x.shape[0]])
        gathered = _AllGather.apply(padded)
        return torch.cat([part[:size] for part, size in zip(gathered.split(largest), self.sizes, strict=True)])
