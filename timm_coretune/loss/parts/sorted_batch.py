"""A batch sorted by label, so that the positives of an anchor are next to each other"""

from typing import NamedTuple, Tuple

import torch


def positive_runs(row_label: torch.Tensor, column_label: torch.Tensor) -> torch.Tensor:
    """First column and end of the run of columns with the label of each row (R, 2) int64, for columns sorted by label.

    It is empty for a row that takes no part.
    """
    start = torch.searchsorted(column_label, row_label)
    stop = torch.searchsorted(column_label, row_label, right=True)
    return torch.stack([start, torch.where(row_label < 0, start, stop)], dim=1)


class SortedBatch(NamedTuple):
    """Embeddings sorted by label, so that the positives of an anchor are one run. Those that take no part are first.

    Attributes:
        rows: Embeddings of the anchors (B, P). The same tensor as columns if all rows of the batch are anchors.
        columns: Embeddings of the batch (N, P).
        row_place: Row of each anchor in the batch (B,) int64.
        column_place: Row of each column in the batch (N,) int64.
        row_label: Class of each anchor (B,) int64.
        column_label: Class of each column (N,) int64.
        row_run: Columns with the label of each anchor (B, 2) int64, see `positive_runs`.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    row_place: torch.Tensor
    column_place: torch.Tensor
    row_label: torch.Tensor
    column_label: torch.Tensor
    row_run: torch.Tensor

    @classmethod
    def create(cls, unit: torch.Tensor, label: torch.Tensor, start: int, stop: int) -> 'SortedBatch':
        columns, column_place, column_label = _sort(unit, label)
        if stop - start == len(unit):
            rows, row_place, row_label = columns, column_place, column_label
        else:
            rows, row_place, row_label = _sort(unit[start:stop], label[start:stop])
            row_place = row_place + start
        row_run = positive_runs(row_label, column_label)
        return cls(rows, columns, row_place, column_place, row_label, column_label, row_run)

    def num_positives(self, dtype: torch.dtype, with_extra: bool) -> torch.Tensor:
        """Number of positives of each anchor (B,), 1 where there is none."""
        start, stop = self.row_run.unbind(dim=1)
        in_batch = (stop - start - 1).clamp(min=0)
        return (in_batch + int(with_extra)).clamp(min=1).to(dtype)


def _sort(unit: torch.Tensor, label: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    label, place = label.sort(stable=True)
    # what an embedding that takes no part holds, such as NaN, reaches no other
    return unit.index_select(0, place).masked_fill_((label < 0)[:, None], 0.0), place, label
