"""Hard pair mining

For every image of a batch: the positive it resembles least, the negative it resembles most, and a random negative.

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605

Written from the paper. The released code takes the argmin of `similarity * mask`, which returns a masked entry whenever
features are non-negative, as they are after a ReLU. Here masked entries are infinite.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from .checks import check_features, check_target


class HardPairs(NamedTuple):
    """Indices into the candidate rows, one per anchor, and whether the anchor has any negative.

    Attributes:
        hard_positive: Least similar candidate of the anchor's class; the anchor itself when it has none (B,) int64.
        hard_negative: Most similar candidate of another class; the anchor itself when it has none (B,) int64.
        random_negative: Uniform draw among the other classes; the anchor itself when it has none (B,) int64.
        has_negative: False where the candidates hold no class but the anchor's (B,) bool.
    """

    hard_positive: torch.Tensor
    hard_negative: torch.Tensor
    random_negative: torch.Tensor
    has_negative: torch.Tensor


def hard_label(target: torch.Tensor) -> torch.Tensor:
    """Class per row: of soft targets (B, C) the most probable one, of class indices (B,) themselves. int64 (B,)."""
    return target.argmax(dim=-1) if target.ndim == 2 else target.long()


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Cast half precision up: a bfloat16 cosine is off by 0.002, which over a temperature of 0.07 is 0.03."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length in float32 or better (B, D). A row of zeros stays zero and gets no gradient (not 1e12)."""
    x = at_least_float32(x)
    return F.normalize(x.masked_fill((x == 0).all(dim=-1, keepdim=True), 0.0), dim=-1)


@torch.no_grad()
def select_hard_pairs(
    features: torch.Tensor,
    label: torch.Tensor,
    draw: torch.Tensor,
    anchor: Optional[torch.Tensor] = None,
    order: Optional[torch.Tensor] = None,
) -> HardPairs:
    """Hard pairs given the random draws: deterministic, no host synchronisation, static shapes.

    Args:
        features: Candidate features of any scale (N, D).
        label: Class of every candidate, negative for those that take no part (N,) int64.
        draw: Uniform in [0, 1), one per anchor, selects its random negative (B,).
        anchor: Row of each anchor among the candidates (B,) int64, all rows in order when None.
        order: Candidates in the order that draws count them in (N,) int64, as they are when None.

    Returns:
        HardPairs with B rows that index the N candidates. Rows of anchors that take no part mean nothing, but index
        candidates too.
    """
    num_candidates = features.shape[0]
    candidate = torch.arange(num_candidates, device=features.device)
    anchor = candidate if anchor is None else anchor
    with torch.autocast(device_type=features.device.type, enabled=False):
        unit = normalize(features.detach())
        similarity = unit[anchor] @ unit.T
    anchor_label = label[anchor]
    takes_part = label >= 0
    same = anchor_label[:, None] == label
    positive = same & (anchor[:, None] != candidate)
    has_positive = positive.any(dim=-1)
    # an anchor is a candidate itself, so either all have a negative or none has
    highest = label.max()
    has_negative = (torch.where(takes_part, label, highest).min() < highest).expand(anchor.shape)
    # argmin of a row of infinities is 0, not «none»
    hard_positive = torch.where(has_positive, similarity.masked_fill(~positive, float('inf')).argmin(dim=-1), anchor)
    negative_similarity = similarity.masked_fill(same | ~takes_part, float('-inf'))
    hard_negative = torch.where(has_negative, negative_similarity.argmax(dim=-1), anchor)

    # Sorted by label, those without part come first and a class is one run [start, end). The k-th negative is the k-th
    # row behind the former once that run is cut out.
    sorted_label, by_label = torch.sort(label if order is None else label[order], stable=True)
    if order is not None:
        by_label = order[by_label]
    num_left_out = num_candidates - takes_part.sum()
    start = torch.searchsorted(sorted_label, anchor_label)
    num_same = torch.searchsorted(sorted_label, anchor_label, right=True) - start
    num_negative = num_candidates - num_left_out - num_same
    k = torch.minimum((draw * num_negative).long(), num_negative - 1).clamp(min=0) + num_left_out
    position = torch.where(k < start, k, k + num_same).clamp(max=num_candidates - 1)
    random_negative = torch.where(has_negative, by_label[position], anchor)
    return HardPairs(hard_positive, hard_negative, random_negative, has_negative)


def mine_hard_pairs(
    features: torch.Tensor,
    label: torch.Tensor,
    generator: Optional[torch.Generator] = None,
) -> HardPairs:
    """Mine the hard pairs of a batch by cosine similarity, without gradient.

    Args:
        features: Pre-logits features of any scale and floating dtype (B, D).
        label: Class indices (B,), or soft targets (B, C), of which the most probable class counts.
        generator: Source of the random negatives, the global one when None. It may live on any device.

    Returns:
        HardPairs, each (B,).

    Raises:
        ValueError: features is no (B, D) matrix or label does not fit it.
    """
    check_features(features)
    check_target(label, features.shape[0])
    device = features.device if generator is None else generator.device
    draw = torch.rand(features.shape[0], generator=generator, device=device)
    return select_hard_pairs(features, hard_label(label), draw.to(features.device, non_blocking=True))
