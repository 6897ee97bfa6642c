"""Blocks of the matrix of scaled similarities, one at a time, and smaller ones if the device has too little memory"""

import functools
import logging
import math
from typing import Any, Callable, Iterator, List, Optional

import torch

from ...mining import at_least_float32

_logger = logging.getLogger(__name__)

# Elements of a block. The 4 MiB of a block in float32 stay near a core of a CPU. A GPU is fed by fewer, larger ones.
CPU_BLOCK = 2**20
GPU_BLOCK = 2**23
SMALLEST_BLOCK = 2**12


@functools.cache  # once in a process
def _warn_of_short_memory() -> None:
    _logger.warning(
        'The device had no memory left for a block of the contrastive loss. It is computed in blocks of half the size, '
        'or smaller ones, which takes longer. The result is the same.'
    )


def halves_its_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function again with half the block while the device has too little memory."""

    @functools.wraps(function)
    def run(rows: torch.Tensor, *args: Any, block: Optional[int] = None, **kwargs: Any) -> Any:
        block = block or (CPU_BLOCK if rows.device.type == 'cpu' else GPU_BLOCK)
        while True:
            try:
                return function(rows, *args, block=block, **kwargs)
            except torch.OutOfMemoryError:
                if block <= SMALLEST_BLOCK:
                    raise
            block //= 2
            _warn_of_short_memory()

    return run


class ScoreBlocks:
    """The matrix z, of which one block exists at a time. Its entries of a row and the column of its place are -inf."""

    def __init__(
        self,
        rows: torch.Tensor,
        columns: torch.Tensor,
        row_place: torch.Tensor,
        column_place: torch.Tensor,
        scale: float,
        block: int,
    ):
        self.rows, self.columns, self.scale = at_least_float32(rows), at_least_float32(columns), scale
        self.height = max(1, math.isqrt(block) // 2)
        self.width = max(1, block // self.height)
        self.buffer = self.rows.new_empty(self.height * min(self.width, len(columns)))
        # the column of the same place, -1 if there is none
        sorted_place, by_place = column_place.sort()
        found = torch.searchsorted(sorted_place, row_place).clamp(max=len(columns) - 1)
        self.own = by_place[found].masked_fill(sorted_place[found] != row_place, -1)

    def row_blocks(self) -> List[slice]:
        num_rows = len(self.rows)
        return [slice(start, min(start + self.height, num_rows)) for start in range(0, num_rows, self.height)]

    def column_blocks(self, start: int, stop: int) -> Iterator[slice]:
        for first in range(start, stop, self.width):
            yield slice(first, min(first + self.width, stop))

    def block(self, rows: slice, columns: slice, bias: torch.Tensor) -> torch.Tensor:
        """A block of z + bias, for a bias that broadcasts to it. It is valid until the next call."""
        own_rows, own_columns = self.rows[rows], self.columns[columns]
        shape = (len(own_rows), len(own_columns))
        z = self.buffer[: shape[0] * shape[1]].view(shape)
        torch.addmm(bias, own_rows, own_columns.T, alpha=self.scale, out=z)
        own = self.own[rows, None] - columns.start
        is_inside = (own >= 0) & (own < shape[1])
        own = own.clamp(0, shape[1] - 1)
        return z.scatter_(1, own, z.gather(1, own).masked_fill_(is_inside, -math.inf))


def spans_of_runs(row_run: torch.Tensor, row_blocks: List[slice], num_columns: int) -> List[List[int]]:
    """First column and end of all runs of each block of rows. This waits for the device once."""
    if not row_blocks:
        return []
    start, stop = row_run.unbind(dim=1)
    start, stop = start.masked_fill(start >= stop, num_columns), stop.masked_fill(start >= stop, 0)
    spans = [torch.stack([start[rows].amin(), stop[rows].amax()]) for rows in row_blocks]
    return torch.stack(spans).tolist()
