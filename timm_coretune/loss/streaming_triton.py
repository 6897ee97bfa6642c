"""The sums of the contrastive loss over all pairs of a batch, by Triton kernels for CUDA devices

For the scaled product z_ik of row i and column k, and lse_i, the log of the sum over k of e^z_ik:
    l = z_ik - lse_i and p = e^l
    phi = (p - 1) l and phi' = p (1 + l) - 1 with the focal factor, else phi = -l and phi' = -1
    G_ik = a_i phi'(l_ik) if k is a positive of i, minus b_i p_ik
    gradient of row i = sum_k (G_ik + G_ki) v_k

A program owns a block of rows, and walks over blocks of columns. Products stay on the chip, so memory is linear in the
number of rows. No two programs write to one place: nothing is added atomically, and results are the same in every run.
Nothing waits for the device. The sizes of blocks are a table, by width and dtype. Triton's autotuner would compile and
time each candidate, and cannot do so while a CUDA graph is captured.

Embeddings of 16 bits are multiplied as they are and summed in float32. The weights G are rounded to their dtype before
they multiply embeddings, as attention kernels do with probabilities. Embeddings in float32 are multiplied by three
products of tensor cores (tf32x3), which come near the precision of float32. 'ieee' would leave the tensor cores unused,
and 'tf32' has errors of 1e-3.

This module imports Triton. Import it only where Triton is installed.
"""

import math
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import triton

from .parts.triton_kernels import gradient_kernel, log_sum_kernel, positive_sums_kernel

Stats = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]

MAX_WIDTH = 1024
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Blocks by bytes of a number and width: the first row that is wide enough counts. They were chosen by the machine code
# of Triton 3.8: at most 99 KiB of shared memory on cards with no more, and hardly any spilled register on an H100.
_BLOCKS = [
    # bytes, width, BLOCK_R, BLOCK_C, BLOCK_P, BLOCK_K, num_warps, num_stages
    (2, 64, 128, 64, 64, 64, 8, 3),
    (2, 128, 128, 64, 128, 128, 8, 3),
    (2, 256, 128, 32, 256, 256, 8, 2),
    (2, MAX_WIDTH, 128, 32, 256, 64, 8, 2),
    (4, 64, 128, 32, 64, 64, 8, 3),
    (4, MAX_WIDTH, 64, 32, 128, 32, 4, 3),
    (8, MAX_WIDTH, 32, 32, 128, 64, 4, 1),
]


def log_sum(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_place: torch.Tensor,
    column_place: torch.Tensor,
    column_label: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Log of the sum of the exponentials of scaled products, over all columns that take part but the row itself.

    Args:
        rows: Embeddings of anchors (R, P), contiguous as all tensors here.
        columns: Embeddings of candidates (C, P), of the dtype of rows.
        row_place: Index of each row in the global batch (R,) int64, below 2^31.
        column_place: Index of each column in the global batch (C,) int64.
        column_label: Class index of each column (C,) int64, below 2^31. Negative for those that take no part.
        scale: Factor of the products, which is one over the temperature.

    Returns:
        One value for each row (R,), -inf if no column is left. float64 for float64, else float32.

    Raises:
        ValueError: P is over 1024, or a tensor is not as said.
    """
    _check(rows, columns, row_place, column_place, column_label)
    out = rows.new_empty(rows.shape[0], dtype=_dtype_of_sums(rows))
    words = _words(rows, columns, scale)
    with torch.cuda.device_of(rows):
        log_sum_kernel[_grid(rows, words)](rows, columns, row_place, column_place, column_label, out, **words)
    return out


def positive_sums(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_place: torch.Tensor,
    column_place: torch.Tensor,
    row_run: torch.Tensor,
    scale: float,
    lse: torch.Tensor,
    focal: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Sums of the loss of each positive and of its slope. Columns are sorted by label.

    A block of rows reads the columns from the smallest start to the largest end of its runs. Those are few if rows are
    sorted by label too. Results are right in any order.

    Args:
        rows: As for `log_sum`.
        columns: As for `log_sum`.
        row_place: As for `log_sum`.
        column_place: As for `log_sum`.
        row_run: Where the columns of the class of each row start and end (R, 2) int64, the end not included. Empty if a
            row takes no part.
        scale: As for `log_sum`.
        lse: Log of the sum of exponentials of each row (R,), in the dtype of sums.
        focal: Positives are weighted by 1 - p.

    Returns:
        Sums of phi and of phi' over the positives of each row, (R,) each.

    Raises:
        ValueError: P is over 1024, or a tensor is not as said.
    """
    _check(rows, columns, row_place, column_place, row_run, sums=[lse])
    loss_sum, slope_sum = torch.empty_like(lse), torch.empty_like(lse)
    words = _words(rows, columns, scale)
    with torch.cuda.device_of(rows):
        positive_sums_kernel[_grid(rows, words)](
            rows, columns, row_place, column_place, row_run, lse, loss_sum, slope_sum, FOCAL=focal, **words
        )
    return loss_sum, slope_sum


def gradient(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_place: torch.Tensor,
    column_place: torch.Tensor,
    row_label: torch.Tensor,
    column_label: torch.Tensor,
    scale: float,
    focal: bool,
    row_stats: Optional[Stats],
    column_stats: Optional[Stats],
) -> torch.Tensor:
    """Gradient of the loss for each row: as an anchor, as a candidate of the columns, or both in one pass.

    Args:
        rows: As for `log_sum`.
        columns: As for `log_sum`.
        row_place: As for `log_sum`.
        column_place: As for `log_sum`.
        row_label: Class index of each row (R,) int64, below 2^31. Negative for those that take no part.
        column_label: As for `log_sum`.
        scale: As for `log_sum`.
        focal: As for `positive_sums`.
        row_stats: lse, a and b of the rows, (R,) each, in the dtype of sums. None if rows are no anchors.
        column_stats: lse, a and b of the columns, (C,) each. None if columns are no anchors.

    Returns:
        The gradient (R, P), 0 for rows that take no part. float64 for float64, else float32.

    Raises:
        ValueError: P is over 1024, a tensor is not as said, or there are no anchors.
    """
    if row_stats is None and column_stats is None:
        raise ValueError('Expected row_stats, column_stats or both, got neither: there are no anchors.')
    stats = [*(row_stats or ()), *(column_stats or ())]
    _check(rows, columns, row_place, column_place, row_label, column_label, sums=stats)
    unit = None
    if rows.dtype == torch.float16:
        # weights are near one over the batch size, less than float16 holds: the largest become a few thousand
        largest = torch.cat([*(stat.abs() for i, stat in enumerate(stats) if i % 3), stats[0].new_full((1,), 1e-30)])
        unit = largest.amax() / 4096
        row_stats, column_stats = (
            None if role is None else (role[0], role[1] / unit, role[2] / unit) for role in (row_stats, column_stats)
        )
    out = torch.empty_like(rows, dtype=_dtype_of_sums(rows))
    words = _words(rows, columns, scale)
    nothing = (None, None, None)
    grid = (*_grid(rows, words), triton.cdiv(rows.shape[1], words['BLOCK_P']))
    with torch.cuda.device_of(rows):
        gradient_kernel[grid](
            rows,
            columns,
            row_place,
            column_place,
            row_label,
            column_label,
            *(row_stats or nothing),
            *(column_stats or nothing),
            out,
            FOCAL=focal,
            ROW_ROLE=row_stats is not None,
            COLUMN_ROLE=column_stats is not None,
            **words,
        )
    return out if unit is None else out.mul_(unit)


def _dtype_of_sums(rows: torch.Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _grid(rows: torch.Tensor, words: Dict[str, Any]) -> Tuple[int]:
    return (triton.cdiv(rows.shape[0], words['BLOCK_R']),)


def _words(rows: torch.Tensor, columns: torch.Tensor, scale: float) -> Dict[str, Any]:
    """Arguments that all kernels have: sizes, the factor of products in units of log 2, blocks."""
    width = rows.shape[1]
    scale = scale * math.log2(math.e)
    # Triton passes floats as float32, too little for float64: what is lost is another argument
    single = torch.tensor(scale, dtype=torch.float32, device='cpu').item()
    blocks = next(row[2:] for row in _BLOCKS if rows.itemsize == row[0] and width <= row[1])
    block_r, block_c, block_p, block_k, num_warps, num_stages = blocks
    padded = max(16, triton.next_power_of_2(width))  # the products of tensor cores are no smaller
    return {
        'R': rows.shape[0],
        'C': columns.shape[0],
        'scale': single,
        'scale_rest': scale - single,
        'P': width,
        'BLOCK_R': block_r,
        'BLOCK_C': block_c,
        'BLOCK_P': min(block_p, padded),
        'BLOCK_K': min(block_k, padded),
        'PRECISION': 'tf32x3' if rows.dtype == torch.float32 else 'ieee',
        'num_warps': num_warps,
        'num_stages': num_stages,
    }


def _check(rows: torch.Tensor, columns: torch.Tensor, *ids: torch.Tensor, sums: Sequence[torch.Tensor] = ()) -> None:
    """Kernels read any memory that they are given as the numbers that they expect."""
    if rows.dtype not in _DTYPES or rows.dtype != columns.dtype or rows.shape[1] != columns.shape[1]:
        raise ValueError(
            f'Expected rows and columns of one width and one dtype of {_DTYPES}, '
            f'got {tuple(rows.shape)} {rows.dtype} and {tuple(columns.shape)} {columns.dtype}.'
        )
    if rows.shape[1] > MAX_WIDTH:
        raise ValueError(
            f'Expected embeddings of up to {MAX_WIDTH} numbers, got {rows.shape[1]}. Project them to fewer.'
        )
    for tensors, dtype in (((rows, columns), rows.dtype), (ids, torch.int64), (sums, _dtype_of_sums(rows))):
        for tensor in tensors:
            if tensor.dtype != dtype or tensor.device != rows.device or not tensor.is_contiguous():
                raise ValueError(
                    f'Expected a contiguous {dtype} tensor on {rows.device}, got {tuple(tensor.shape)} {tensor.dtype} '
                    f'on {tensor.device} with strides {tensor.stride()}.'
                )
