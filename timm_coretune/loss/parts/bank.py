"""Rows that a loss remembers from one step to the next"""

from typing import Dict

import torch
import torch.nn as nn


class Bank(nn.Module):
    """The newest rows of each group, in buffers. It is the same on all processes if it is given the rows of all.

    Its tensors have one row more than `num_groups * size`: it stays empty, as rows without a group are written there.

    Args:
        size: Number of rows of a group, >= 1.
        widths: Width of each column of the bank, by its name.
        num_groups: Number of groups.

    Attributes:
        label: Class of each row (num_groups * size + 1,) int64, -1 where the bank is empty.

    Raises:
        ValueError: size is less than 1.
    """

    label: torch.Tensor
    position: torch.Tensor

    def __init__(self, size: int, widths: Dict[str, int], num_groups: int = 1):
        super().__init__()
        if size < 1:
            raise ValueError(f'Expected a bank of 1 row or more, got {size}.')
        self.size = size
        self.num_groups = num_groups
        num_rows = num_groups * size + 1
        for name, width in widths.items():
            self.register_buffer(name, torch.zeros(num_rows, width))
        self.register_buffer('label', torch.full((num_rows,), -1))
        self.register_buffer('position', torch.zeros(num_groups, dtype=torch.int64))

    @torch.no_grad()
    def add(self, label: torch.Tensor, group: torch.Tensor, **columns: torch.Tensor) -> None:
        """Overwrite the oldest rows of each group. Shapes are static, and nothing waits for the device.

        Args:
            label: Class of the new rows of all processes (N,) int64. Rows with a negative one are left out.
            group: Group of each row (N,) int64, of any value where the label is negative.
            **columns: The new rows (N, width) by the name of their column.
        """
        group = group.masked_fill(label < 0, -1)
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
