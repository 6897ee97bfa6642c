"""Gather the rows of all processes into a global batch, with gradients

Every process computes the loss of its own rows against the rows of all processes. The rows of a process also take part
in the losses of the others, and the backward pass adds up these gradients. DistributedDataParallel (or FSDP) then
averages over processes, and the result is exactly the gradient of one process with the whole batch.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx


def process_index_and_count() -> Tuple[int, int]:
    """Rank of this process, and the number of processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _all_gather(x: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, without gradient. All processes must have the same number of rows."""
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
    """Gathers rows of all processes in rank order, with gradient. All processes must have the same number of rows.

    The losses of all processes use the gathered rows, so the backward pass sums their gradients over processes.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        # with create_graph=True the backward pass is differentiated itself
        return _SumScatter.apply(grad) if torch.is_grad_enabled() else _sum_scatter(grad)


def _sum_scatter(grad: torch.Tensor) -> torch.Tensor:
    """Rows of this process in the sum over processes, without gradient."""
    num_rows = grad.shape[0] // dist.get_world_size()
    if dist.get_backend() == 'gloo':  # older versions of gloo cannot reduce-scatter a single tensor
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.narrow(0, dist.get_rank() * num_rows, num_rows)
    own = grad.new_empty((num_rows, *grad.shape[1:]))
    scatter = getattr(dist, 'reduce_scatter_single', None) or dist.reduce_scatter_tensor
    scatter(own, grad.contiguous())
    return own


class _SumScatter(torch.autograd.Function):
    """Sums over processes and keeps the rows of this process. It is the transpose of `_AllGather`, and the reverse."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        return _sum_scatter(grad)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        return _AllGather.apply(grad)


@dataclass  # not frozen: wrappers such as Lightning Fabric rebuild the arguments of the modules that they call
class GlobalBatch:
    """Which rows of the global batch belong to which process.

    Attributes:
        rank: Index of this process.
        sizes: Number of rows of every process, in rank order.
        rows_per_image: Number of rows for each image. The rows of an image are next to each other.
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
            batch_size: Number of images of this process.
            gather: Whether to use the rows of all processes. False uses the rows of this process only.
            uneven: Whether processes may have different numbers of images. The processes then exchange their numbers,
                which costs a synchronisation with the device. False requires batch_size images on every process.
            device: Device on which the process group exchanges tensors.
            rows_per_image: Number of rows for each image.
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
        """Number of rows of all processes together."""
        return sum(self.sizes)

    @property
    def world_size(self) -> int:
        """Number of processes whose rows are used."""
        return len(self.sizes)

    def mean(self, total: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Scale the loss of this process so that its average over processes is the mean over all labelled rows.

        Args:
            total: Sum of the losses of the rows of this process, a scalar.
            label: Class of the rows of all processes, negative for rows that take no part (N,) int64. Or label sets
                (N, C), which all take part.
        """
        label = label if label.ndim == 1 else label.amax(dim=1)
        return total * self.world_size / (label >= 0).sum().clamp(min=1)

    @property
    def own(self) -> slice:
        """The rows of this process in the global batch."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def own_rows(self, device: torch.device) -> torch.Tensor:
        """Indices of the rows of this process in the global batch (B,) int64."""
        return torch.arange(self.own.start, self.own.stop, device=device)

    def reading_order(self, device: torch.device) -> Optional[torch.Tensor]:
        """Order in which a single process would read the rows of the global batch.

        A distributed sampler deals images out to the processes in turn, so image b of process r is image
        b * world_size + r of a single process. Random numbers that are assigned to rows in this order do not depend on
        the number of processes.

        Returns:
            Indices of rows (N,) int64, None if the rows are in this order already.
        """
        if self.world_size == 1:
            return None
        if min(self.sizes) == max(self.sizes):
            rows = torch.arange(self.num_rows, device=device)
            return rows.view(self.world_size, -1, self.rows_per_image).transpose(0, 1).flatten()
        places = [(row // self.rows_per_image, rank) for rank, size in enumerate(self.sizes) for row in range(size)]
        return torch.tensor(sorted(range(self.num_rows), key=places.__getitem__), device=device)

    def own_share(self, draws: torch.Tensor) -> torch.Tensor:
        """Random numbers for the rows of this process, from those for the rows of all processes.

        Every process draws the numbers for the whole global batch, in the order of `reading_order`, and takes its own.
        An image therefore gets the same numbers on any number of processes.

        Args:
            draws: Random numbers for the rows of all processes, the same on each process (>= N, ...).

        Returns:
            The numbers for each row of this process (B, ...).
        """
        rank, num_processes = process_index_and_count()
        num_images = draws.shape[0] // (num_processes * self.rows_per_image)
        own = draws.view(num_images, num_processes, self.rows_per_image, *draws.shape[1:])[:, rank].flatten(0, 1)
        return own[: self.sizes[self.rank]]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the rows x (B, ...) of all processes in rank order into (N, ...), differentiable in x."""
        if self.world_size == 1:
            return x
        largest = max(self.sizes)
        if min(self.sizes) == largest:
            return _AllGather.apply(x)
        padded = F.pad(x, [0, 0] * (x.ndim - 1) + [0, largest - x.shape[0]])
        gathered = _AllGather.apply(padded)
        return torch.cat([part[:size] for part, size in zip(gathered.split(largest), self.sizes, strict=True)])
