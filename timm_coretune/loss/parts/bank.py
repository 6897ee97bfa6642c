"""Rows that a loss remembers from one step to the next"""

from typing import Dict, Optional

import torch
import torch.nn as nn

from ...distributed import GlobalBatch


class Bank(nn.Module):
    """The newest rows, of all classes together or of each class, in buffers.

    It holds the rows of all processes in the order in which one process would read them, so it is the same on all, and
    on any number of them. Its tensors have one row more, which stays empty: rows without a class are written there.

    Args:
        size: Number of rows, >= 1.
        widths: Width of each column of the bank, by its name.
        num_classes: When given, the bank has `size` rows for each class.

    Attributes:
        label: Class of each row (num_rows + 1,) int64, -1 where the bank is empty.

    Raises:
        ValueError: size is less than 1.
    """

    label: torch.Tensor
    position: torch.Tensor

    def __init__(self, size: int, widths: Dict[str, int], num_classes: Optional[int] = None):
        super().__init__()
        if size < 1:
            raise ValueError(f'Expected a bank of 1 row or more, got {size}.')
        self.size = size
        self.by_class = num_classes is not None
        self.num_groups = 1 if num_classes is None else num_classes
        num_rows = self.num_groups * size + 1
        for name, width in widths.items():
            self.register_buffer(name, torch.zeros(num_rows, width))
        self.register_buffer('label', torch.full((num_rows,), -1))
        self.register_buffer('position', torch.zeros(self.num_groups, dtype=torch.int64))

    @torch.no_grad()
    def add(self, batch: GlobalBatch, label: torch.Tensor, **columns: torch.Tensor) -> None:
        """Overwrite the oldest rows. Shapes are static, and nothing waits for the device.

        Args:
            batch: The global batch.
            label: Class of the rows of all processes (N,) int64. Rows with a negative one are left out.
            **columns: The new rows of this process (B, width) by the name of their column.
        """
        columns = {name: batch.gather(rows.detach()) for name, rows in columns.items()}
        order = batch.reading_order(label.device)
        if order is not None:
            label = label.index_select(0, order)
            columns = {name: rows.index_select(0, order) for name, rows in columns.items()}
        group = (label if self.by_class else torch.zeros_like(label)).masked_fill(label < 0, -1)
        same = group[:, None] == group
        num_earlier = same.tril(-1).sum(dim=1)
        # of more rows than a group holds, the last ones stay
        stays = (group >= 0) & (same.triu(1).sum(dim=1) < self.size)
        place = group * self.size + (self.position[group.clamp(min=0)] + num_earlier) % self.size
        place = place.masked_fill(~stays, self.num_groups * self.size)
        self.label.index_copy_(0, place, label.masked_fill(~stays, -1))
        for name, rows in columns.items():
            column = getattr(self, name)
            # all that is written to the empty row is 0, so the order of writing does not matter
            column.index_copy_(0, place, rows.masked_fill(~stays[:, None], 0.0).to(column.dtype))
        num_new = (group[:, None] == torch.arange(self.num_groups, device=group.device)).sum(dim=0)
        self.position.copy_((self.position + num_new) % self.size)
