"""Hard pair mining

For every image of a batch, the anchor, mining finds three other images of the batch: the hard positive, which is the
least similar one of the same class, the hard negative, which is the most similar one of another class, and a random one
of another class.

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605

Written from the paper. It differs from the released code, which takes the argmin of `similarity * mask`. After a ReLU
all features are non-negative, and that argmin is an entry which the mask excludes. Here excluded entries are infinite.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from ..checks import check_features, check_not_recomputed, check_target
from .hardest import find_hardest


class HardPairs(NamedTuple):
    """Hard pairs of B anchors, as row indices of the candidates.

    Attributes:
        hard_positive: Least similar candidate of the anchor's class, or the anchor itself if it has none (B,) int64.
        hard_negative: Most similar candidate of another class, or the anchor itself if it has none (B,) int64.
        random_negative: Random candidate of another class, or the anchor itself if it has none (B,) int64.
        has_negative: Whether there is a candidate of another class than the anchor's (B,) bool.
    """

    hard_positive: torch.Tensor
    hard_negative: torch.Tensor
    random_negative: torch.Tensor
    has_negative: torch.Tensor


def hard_label(target: torch.Tensor) -> torch.Tensor:
    """Class of every row (B,) int64: the most probable one of soft targets (B, C); class indices (B,) stay."""
    return target.argmax(dim=-1) if target.ndim == 2 else target.long()


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Cast half precision to float32. The error of a bfloat16 cosine, 0.002, is 0.03 after division by 0.07."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Scale rows (B, D) to length 1, in float32 or better. A row of zeros stays, with gradient 0 instead of 1e12."""
    x = at_least_float32(x)
    return F.normalize(x.masked_fill((x == 0).all(dim=-1, keepdim=True), 0.0), dim=-1)


@torch.no_grad()
def select_hard_pairs(
    features: torch.Tensor,
    label: torch.Tensor,
    draw: torch.Tensor,
    anchor: Optional[torch.Tensor] = None,
    order: Optional[torch.Tensor] = None,
    positive_draw: Optional[torch.Tensor] = None,
) -> HardPairs:
    """Find the hard pairs for given random draws, deterministically, with static shapes and no wait for the device.

    The similarities of a large batch are computed block by block, so memory grows with N, and not with B * N.

    Args:
        features: Features of the candidates (N, D) of any scale.
        label: Class of every candidate (N,) int64. Candidates with a negative label take no part.
        draw: Uniform numbers in [0, 1), one for each anchor (B,). They choose the random negatives.
        anchor: Row of each anchor among the candidates (B,) int64. When None every candidate is an anchor.
        order: Order of the candidates (N,) int64 in which draws count them. When None that of the rows.
        positive_draw: Uniform numbers in [0, 1), K for each anchor (B, K). They choose K random candidates of its
            class, with repetition, and the hard positive is the least similar of these. When None, or with K = 0, it is
            the least similar of the whole class.

    Returns:
        HardPairs with B rows that index the N candidates. Rows of anchors that take no part are meaningless, but valid
        indices.
    """
    num_candidates = features.shape[0]
    candidate = torch.arange(num_candidates, device=features.device)
    anchor = candidate if anchor is None else anchor
    anchor_label = label[anchor]
    takes_part = label >= 0
    # an anchor is a candidate itself, so either all have a negative or none has
    highest = label.max()
    has_negative = (torch.where(takes_part, label, highest).min() < highest).expand(anchor.shape)

    # After sorting by label, candidates that take no part come first, and every class is one run of rows. Skip those
    # candidates and the run of the anchor's class: the k-th remaining row is the k-th negative.
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

    chosen = None
    if positive_draw is not None and positive_draw.shape[1] > 0:
        # the run of the anchor's class without the anchor: the k-th remaining row is the k-th positive
        place = torch.empty_like(candidate).index_copy(0, by_label, candidate)[anchor] - start
        num_positive = (num_same - 1)[:, None]
        k = torch.minimum((positive_draw * num_positive).long(), num_positive - 1).clamp(min=0)
        position = start[:, None] + torch.where(k < place[:, None], k, k + 1)
        chosen = by_label[position.clamp(max=num_candidates - 1)]
    with torch.autocast(device_type=features.device.type, enabled=False):
        hard_positive, hard_negative = find_hardest(normalize(features.detach()), label, anchor, chosen)
    # an anchor that is alone in its class has only itself
    hard_positive = torch.where(num_same > 1, hard_positive, anchor)
    hard_negative = torch.where(has_negative, hard_negative, anchor)
    return HardPairs(hard_positive, hard_negative, random_negative, has_negative)


def mine_hard_pairs(
    features: torch.Tensor,
    label: torch.Tensor,
    generator: Optional[torch.Generator] = None,
) -> HardPairs:
    """Mine the hard pairs of a batch by cosine similarity, without gradient.

    Args:
        features: Pre-logits features (B, D) of any scale and floating dtype.
        label: Class indices (B,), or soft targets (B, C), whose most probable class is taken.
        generator: Random generator for the random negatives, on any device. When None torch's global one.

    Returns:
        HardPairs, whose fields have the shape (B,).

    Raises:
        ValueError: features is no (B, D) matrix or label does not fit it.
    """
    check_features(features)
    check_target(label, features.shape[0])
    device = features.device
    if generator is not None:
        check_not_recomputed()
        device = generator.device
    draw = torch.rand(features.shape[0], generator=generator, device=device)
    return select_hard_pairs(features, hard_label(label), draw.to(features.device, non_blocking=True))
