"""The sums and the gradient of the contrastive loss, block by block, on any device

Rows are anchors, columns are candidates. The matrix of their cosines is never whole: each block of it is computed, used
and overwritten. So memory grows with the number of rows and of columns, and not with their product.

For row i and column k, z_ik = scale * row_i . column_k, and scale is 1 / temperature. A column takes part if its label
is not negative. A row never meets the column of its own place. lse_i is the logarithm of the sum of exp(z_ik) over the
columns that take part, and l_ik = z_ik - lse_i the logarithm of the probability p_ik. The loss of a positive pair is
phi(l) = (exp(l) - 1) l with the focal factor, else -l. Its slope phi'(l) is exp(l) (1 + l) - 1, else -1.

Embeddings are (R, P) and (C, P), of one floating dtype. Sums and results are in float32, or in float64 for float64.
"""

import math
from typing import Optional, Tuple

import torch

from .parts.score_blocks import ScoreBlocks, halves_its_blocks, spans_of_runs
from .parts.sorted_batch import positive_runs

# lse, and the factors a of the slopes of positives and b of the probabilities of candidates, each of all anchors
Stats = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _is_positive(log_p: torch.Tensor, row_run: torch.Tensor, first: int) -> torch.Tensor:
    """Whether the columns from `first` on are positives of their rows, in the shape of log_p, which is -inf for own."""
    column = torch.arange(first, first + log_p.shape[1], device=log_p.device)
    return (column >= row_run[:, :1]) & (column < row_run[:, 1:]) & (log_p != -math.inf)


def _slope(log_p: torch.Tensor, is_positive: torch.Tensor, focal: bool) -> torch.Tensor:
    """phi' of positives, and 0 elsewhere. Overwrites log_p."""
    if not focal:
        return is_positive.to(log_p.dtype).neg_()
    log_p.masked_fill_(~is_positive, 0.0)
    minus_q = log_p.expm1()  # p - 1 without the rounding of p, which counts near p = 1
    return torch.addcmul(log_p + minus_q, log_p, minus_q)


@halves_its_blocks
def log_sum(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_place: torch.Tensor,
    column_place: torch.Tensor,
    column_label: torch.Tensor,
    scale: float,
    *,
    block: int,
) -> torch.Tensor:
    """Logarithm of the sum of exp(z) over the columns that take part (R,), -inf where there is none."""
    scores = ScoreBlocks(rows, columns, row_place, column_place, scale, block)
    left_out = torch.zeros_like(scores.columns[:, 0]).masked_fill_(column_label < 0, -math.inf)
    # finite, as -inf minus -inf would be NaN
    highest = torch.full_like(scores.rows[:, 0], torch.finfo(scores.rows.dtype).min)
    total = torch.zeros_like(highest)
    for r in scores.row_blocks():
        for c in scores.column_blocks(0, len(columns)):
            z = scores.block(r, c, left_out[c])
            new = torch.maximum(highest[r], z.amax(dim=1))
            total[r] *= (highest[r] - new).exp_()
            total[r] += z.sub_(new[:, None]).exp_().sum(dim=1)
            highest[r] = new
    return total.log_().add_(highest)


@halves_its_blocks
def positive_sums(
    rows: torch.Tensor,
    columns: torch.Tensor,
    row_place: torch.Tensor,
    column_place: torch.Tensor,
    row_run: torch.Tensor,
    scale: float,
    lse: torch.Tensor,
    focal: bool,
    *,
    block: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Sums of phi and of phi' over the positives of each row, twice (R,), given their runs, see `positive_runs`."""
    scores = ScoreBlocks(rows, columns, row_place, column_place, scale, block)
    loss_sum, slope_sum = torch.zeros_like(lse), torch.zeros_like(lse)
    row_blocks = scores.row_blocks()
    for r, span in zip(row_blocks, spans_of_runs(row_run, row_blocks, len(columns)), strict=True):
        for c in scores.column_blocks(*span):
            log_p = scores.block(r, c, -lse[r, None])
            is_positive = _is_positive(log_p, row_run[r], c.start)
            log_p.masked_fill_(~is_positive, 0.0)
            if focal:
                minus_q = log_p.expm1()
                # phi' = p (1 + l) - 1 = (p - 1) + l + phi
                slope_sum[r] += log_p.sum(dim=1) + minus_q.sum(dim=1)
                phi = log_p.mul_(minus_q).sum(dim=1)
                loss_sum[r] += phi
                slope_sum[r] += phi
            else:
                loss_sum[r] -= log_p.sum(dim=1)
                slope_sum[r] -= is_positive.sum(dim=1)
    return loss_sum, slope_sum


@halves_its_blocks
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
    *,
    block: int,
) -> torch.Tensor:
    """Gradient for each row (R, P), of the losses of the rows, of the columns, or of both.

    With G_ik = a_i phi'(l_ik) [k is a positive of i] - b_i p_ik, row i gets the sum over k of G_ik column_k with
    row_stats, and of G_ki column_k with column_stats. Those who give stats are anchors, the others candidates.

    Args:
        rows: Embeddings, sorted by label.
        columns: Embeddings, sorted by label.
        row_place: Place of each row (R,) int64.
        column_place: Place of each column (C,) int64, all different.
        row_label: Class of each row (R,) int64, negative for those that take no part and get 0.
        column_label: Class of each column (C,) int64.
        scale: 1 / temperature.
        focal: Whether pairs have the focal factor.
        row_stats: lse, a and b of the rows (R,). For rows that take no part all are 0.
        column_stats: lse, a and b of the columns (C,).
        block: Number of elements of a block.
    """
    scores = ScoreBlocks(rows, columns, row_place, column_place, scale, block)
    left_out = torch.zeros_like(scores.columns[:, 0]).masked_fill_(column_label < 0, -math.inf)
    result = torch.zeros_like(scores.rows)
    row_run = positive_runs(row_label, column_label)
    row_blocks = scores.row_blocks()
    buffer = torch.empty_like(scores.buffer)
    for r, (start, stop) in zip(row_blocks, spans_of_runs(row_run, row_blocks, len(columns)), strict=True):
        for c in scores.column_blocks(0, len(columns)):
            z = scores.block(r, c, left_out[c])
            g = buffer[: z.numel()].view_as(z)
            positives = slice(max(start, c.start) - c.start, min(stop, c.stop) - c.start)
            has_positives = positives.start < positives.stop
            if has_positives:
                of_pairs = z[:, positives]
                is_positive = _is_positive(of_pairs, row_run[r], c.start + positives.start)
                slope = torch.zeros_like(of_pairs)
                if row_stats is not None:
                    lse, factor, _ = (x[r, None] for x in row_stats)
                    slope += _slope(of_pairs - lse, is_positive, focal).mul_(factor)
                if column_stats is not None:
                    lse, factor, _ = (x[c][positives] for x in column_stats)
                    slope += _slope(of_pairs - lse, is_positive, focal).mul_(factor)
            g.zero_()
            if row_stats is not None:
                lse, _, factor = (x[r, None] for x in row_stats)
                torch.sub(z, lse, out=g).exp_().mul_(-factor)
            if column_stats is not None:
                lse, _, factor = (x[c] for x in column_stats)
                g.addcmul_(z.sub_(lse).exp_(), factor, value=-1.0)
            if has_positives:
                g[:, positives] += slope
            result[r].addmm_(g, scores.columns[c])
    return result.masked_fill_((row_label < 0)[:, None], 0.0)
