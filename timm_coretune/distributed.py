"""Gather the rows of all processes into a global batch, with gradients

Every process computes the loss of its own rows against the rows of all processes. The rows of a process also take part
in the losses of the others, and the backward pass adds up these gradients. DistributedDataParallel (or FSDP) then
averages over processes, and the result is exactly the gradient of one process with the whole batch.
"""

import functools
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

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


def copy_to(x: torch.Tensor, device: Optional[torch.device]) -> torch.Tensor:
    """Copy x to a device without waiting for it. Only memory that is pinned can be read later by a GPU."""
    if device is not None and device.type == 'cuda' and x.device.type == 'cpu':
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over processes, without gradient."""
    if process_index_and_count()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def _pack(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of tensors (B, ...) of any dtypes in one matrix (B, num_bytes) uint8."""
    return torch.cat([x.flatten(1).contiguous().view(torch.uint8) for x in columns], dim=1)


def _unpack(rows: torch.Tensor, columns: Sequence[torch.Tensor]) -> Tuple[torch.Tensor, ...]:
    """The tensors (N, ...) whose bytes are in `rows`, in the dtypes and widths of `columns`."""
    num_bytes = [x[:1].numel() * x.element_size() for x in columns]
    parts = zip(rows.split(num_bytes, dim=1), columns, strict=True)
    return tuple(part.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for part, x in parts)


class _AllGather(torch.autograd.Function):
    """Gathers the rows of all processes in rank order, with gradient: one exchange forward and one backward.

    All processes must have the same number of rows. The losses of all processes use the gathered rows, so the backward
    pass sums their gradients over processes, in the widest of their dtypes.
    """

    @staticmethod
    def forward(ctx: Any, *columns: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        flat = [x.unsqueeze(1) if x.ndim == 1 else x for x in columns]
        gathered = _unpack(_all_gather(_pack(flat)), flat)
        gathered = tuple(x.squeeze(1) if own.ndim == 1 else x for x, own in zip(gathered, columns, strict=True))
        wanted = zip(gathered, ctx.needs_input_grad, strict=True)
        ctx.mark_non_differentiable(*[x for x, needs_grad in wanted if not needs_grad])
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return grads
        dtype = functools.reduce(torch.promote_types, [grad.dtype for grad in given])
        packed = torch.cat([grad.flatten(1).to(dtype) for grad in given], dim=1)
        # with create_graph=True the backward pass is differentiated itself
        own = _SumScatter.apply(packed) if torch.is_grad_enabled() else _sum_scatter(packed)
        parts = iter(own.split([grad[:1].numel() for grad in given], dim=1))
        return tuple(None if grad is None else next(parts).to(grad.dtype).view(-1, *grad.shape[1:]) for grad in grads)


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
        return _AllGather.apply(grad)[0]


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
        # by the index of the image, then by process; rows of an image stay next to each other
        rows = torch.cat([torch.arange(size, device=device) for size in self.sizes])
        rank = torch.cat([torch.full((size,), r, device=device) for r, size in enumerate(self.sizes)])
        return torch.argsort(rows // self.rows_per_image * self.world_size + rank, stable=True)

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
        return self.gather_together(x=x)['x']

    def gather_together(self, **columns: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Gather several tensors (B, ...) as `gather` does, of any dtypes, in one exchange forward and one backward."""
        if self.world_size == 1 or not columns:
            return columns
        largest = max(self.sizes)
        is_even = min(self.sizes) == largest
        padded = [
            x if is_even else F.pad(x, [0, 0] * (x.ndim - 1) + [0, largest - x.shape[0]]) for x in columns.values()
        ]
        gathered = dict(zip(columns, _AllGather.apply(*padded), strict=True))
        if is_even:
            return gathered
        return {
            name: torch.cat([part[:size] for part, size in zip(x.split(largest), self.sizes, strict=True)])
            for name, x in gathered.items()
        }
