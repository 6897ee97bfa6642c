"""Images with several labels each: how far label sets overlap, and the hard pairs that follow

Two images are positives as far as their labels overlap, which the Jaccard index measures: the number of labels that
both have over the number that either has. Two images without any label have an index of 0, so such an image has no
positive, and all others are its negatives.

Here and in the losses, labels are a matrix (N, C) of 0 and 1 in a floating dtype, where images of one label have class
indices (N,). Where every row has one label, results are those of class indices to the last bit.
"""

from typing import Optional, Tuple

import torch

from ..checks import check_target
from . import HardPairs, normalize
from .hardest import in_blocks


def label_sets(target: torch.Tensor) -> torch.Tensor:
    """Labels of each image (N, C), 0 or 1 in float32, from soft targets (N, C): those of 0.5 or more."""
    return (target >= 0.5).float()


def jaccard(sets: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Jaccard index of all pairs of label sets, (B, C) and (N, C), as (B, N) in [0, 1]. That of two empty sets is 0."""
    with torch.autocast(device_type=sets.device.type, enabled=False):
        shared = sets @ others.T
    return shared / (sets.sum(dim=1)[:, None] + others.sum(dim=1) - shared).clamp(min=1)


def jaccard_of_rows(sets: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Jaccard index of each row of label sets (B, C) and the same row of others (B, C), as (B,)."""
    shared = (sets * others).sum(dim=1)
    return shared / (sets.sum(dim=1) + others.sum(dim=1) - shared).clamp(min=1)


def check_multi_label(target: torch.Tensor, batch_size: int, num_classes: int) -> None:
    """Reject targets that are not multi-hot rows of this batch. On an accelerator their values are not looked at.

    Raises:
        ValueError: Shape, dtype or values do not fit.
    """
    if target.ndim != 2 or not target.is_floating_point():
        raise ValueError(
            f'Expected multi-hot targets ({batch_size}, {num_classes}) of a floating-point dtype, got {target.dtype} '
            f'{tuple(target.shape)}. timm.data.target_transforms.MultiLabelTarget makes them of lists of class indices.'
        )
    check_target(target, batch_size, num_classes)
    if target.device.type == 'cpu' and target.numel() and not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in target.detach().aminmax())
        if not (low >= 0 and high <= 1):  # NaN too
            raise ValueError(f'Expected multi-hot targets in [0, 1], got values from {low:g} to {high:g}.')


def _find_nth(chosen: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Column of the n-th true entry of each row, counted from 0: chosen (B, N) bool, n (B, K) int64, result (B, K)."""
    place = torch.searchsorted(chosen.cumsum(dim=1), n + 1)
    return place.clamp(max=chosen.shape[1] - 1)


@torch.no_grad()
def select_hard_pairs_of_sets(
    features: torch.Tensor,
    label: torch.Tensor,
    draw: torch.Tensor,
    anchor: Optional[torch.Tensor] = None,
    order: Optional[torch.Tensor] = None,
    positive_draw: Optional[torch.Tensor] = None,
) -> HardPairs:
    """Find the hard pairs of images with several labels, as `mining.select_hard_pairs` does for one label.

    The hard positive is the least similar image with a label in common, the hard negative the most similar one without,
    and the random negative any one without. Not all anchors need have a negative.

    Args:
        features: As for `mining.select_hard_pairs`.
        label: Label sets of the candidates (N, C).
        draw: As for `mining.select_hard_pairs`.
        anchor: As for `mining.select_hard_pairs`.
        order: As for `mining.select_hard_pairs`. Draws count the candidates by their first label, then in this order.
        positive_draw: As for `mining.select_hard_pairs`, from the images with a label in common.

    Returns:
        HardPairs with B rows that index the N candidates.
    """
    candidate = torch.arange(features.shape[0], device=features.device)
    anchor = candidate if anchor is None else anchor
    unit = normalize(features.detach())
    first_label = label.argmax(dim=1)
    by_label = torch.sort(first_label if order is None else first_label[order], stable=True).indices
    if order is not None:
        by_label = order[by_label]

    def select(
        anchor: torch.Tensor, draw: torch.Tensor, positive_draw: Optional[torch.Tensor]
    ) -> Tuple[torch.Tensor, ...]:
        with torch.autocast(device_type=unit.device.type, enabled=False):
            similarity = unit[anchor] @ unit.T
        is_other = anchor[:, None] != candidate
        overlaps = jaccard(label[anchor], label) > 0
        positive, negative = overlaps & is_other, ~overlaps & is_other
        has_positive, has_negative = positive.any(dim=1), negative.any(dim=1)
        hard_negative = similarity.masked_fill(~negative, float('-inf')).argmax(dim=1)

        num_negative = negative.sum(dim=1)
        k = torch.minimum((draw * num_negative).long(), num_negative - 1).clamp(min=0)
        random_negative = by_label[_find_nth(negative[:, by_label], k[:, None])[:, 0]]

        if positive_draw is None or positive_draw.shape[1] == 0:
            hard_positive = similarity.masked_fill(~positive, float('inf')).argmin(dim=1)
        else:
            num_positive = positive.sum(dim=1, keepdim=True)
            k = torch.minimum((positive_draw * num_positive).long(), num_positive - 1).clamp(min=0)
            chosen = by_label[_find_nth(positive[:, by_label], k)]
            hard_positive = chosen.gather(1, similarity.gather(1, chosen).argmin(dim=1, keepdim=True))[:, 0]
        return (
            torch.where(has_positive, hard_positive, anchor),
            torch.where(has_negative, hard_negative, anchor),
            torch.where(has_negative, random_negative, anchor),
            has_negative,
        )

    return HardPairs(*in_blocks(select, len(candidate), anchor, draw, positive_draw))
