"""The hardest pairs of anchors, from a block of the matrix of similarities at a time"""

from functools import partial
from typing import Callable, List, Optional, Tuple

import torch

# Most similarities of a block, if that are FEWEST_ROWS or more. Up to this size the matrix is whole.
BLOCK = 2**22
# The product of a few rows sums in another order than that of many, and may break ties otherwise.
FEWEST_ROWS = 32


def in_blocks(
    function: Callable[..., Tuple[torch.Tensor, ...]],
    num_candidates: int,
    anchor: torch.Tensor,
    *of_anchors: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, ...]:
    """Call a function with some anchors at a time, and join the rows that it returns.

    Args:
        function: Takes tensors with a row for each anchor, or None, and returns such tensors.
        num_candidates: Number of candidates of an anchor.
        anchor: First argument of the function (B,).
        *of_anchors: Its other arguments (B, ...), or None.
    """
    num_rows = max(FEWEST_ROWS, BLOCK // num_candidates)
    if len(anchor) <= num_rows:
        return function(anchor, *of_anchors)
    num_blocks = -(-len(anchor) // num_rows)
    columns = [[None] * num_blocks if x is None else x.tensor_split(num_blocks) for x in (anchor, *of_anchors)]
    results: List[torch.Tensor] = []
    start = 0
    for block in zip(*columns, strict=True):
        rows = function(*block)
        # small tensors kept between the large ones of each block would keep the allocator from using their memory again
        results = results or [x.new_empty(len(anchor), *x.shape[1:]) for x in rows]
        for result, x in zip(results, rows, strict=True):
            result[start : start + len(x)] = x
        start += len(rows[0])
    return tuple(results)


def _hardest(
    unit: torch.Tensor, label: torch.Tensor, anchor: torch.Tensor, chosen: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    similarity = unit[anchor] @ unit.T
    same = label[anchor][:, None] == label
    if chosen is None:
        positive = same & (anchor[:, None] != torch.arange(len(unit), device=unit.device))
        hard_positive = similarity.masked_fill(~positive, float('inf')).argmin(dim=-1)
    else:
        hard_positive = chosen.gather(1, similarity.gather(1, chosen).argmin(dim=-1, keepdim=True))[:, 0]
    return hard_positive, similarity.masked_fill(same | (label < 0), float('-inf')).argmax(dim=-1)


@torch.library.custom_op('timm_coretune::hardest_pairs', mutates_args=())
def _hardest_in_blocks(
    unit: torch.Tensor, label: torch.Tensor, anchor: torch.Tensor, chosen: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(device_type=unit.device.type, enabled=False):
        hard_positive, hard_negative = in_blocks(partial(_hardest, unit, label), len(unit), anchor, chosen)
    return hard_positive, hard_negative


@_hardest_in_blocks.register_fake
def _(
    unit: torch.Tensor, label: torch.Tensor, anchor: torch.Tensor, chosen: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(anchor), torch.empty_like(anchor)


def find_hardest(
    unit: torch.Tensor, label: torch.Tensor, anchor: torch.Tensor, chosen: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Least similar positive and most similar negative of each anchor, two times (B,) int64. Of equals the first.

    Where there is none, the row is meaningless, but a valid one.

    Args:
        unit: Features of the candidates (N, D), of length 1.
        label: Class of every candidate (N,) int64. Candidates with a negative label are no negatives.
        anchor: Row of each anchor among the candidates (B,) int64.
        chosen: Rows among which the least similar positive is searched (B, K) int64. When None, those of its class.
    """
    if len(anchor) * len(unit) <= BLOCK:
        return _hardest(unit, label, anchor, chosen)
    # an operator, as torch.compile would write down every block
    return _hardest_in_blocks(unit, label, anchor, chosen)
