"""The contrastive loss of each anchor from the whole matrix of similarities, which any derivative can be taken of"""

from typing import Optional

import torch
import torch.nn.functional as F

from ...mining.label_sets import jaccard


def dense_contrast(
    unit: torch.Tensor,
    label: torch.Tensor,
    anchor: slice,
    unit_positive: Optional[torch.Tensor],
    unit_negative: Optional[torch.Tensor],
    has_negative: Optional[torch.Tensor],
    temperature: float,
    focal: bool,
    positive_weight: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The loss of each anchor in nats (B,). Arguments are those of `FocalSupConLoss.per_anchor`, and its settings."""
    candidate = torch.arange(unit.shape[0], device=unit.device)
    own, own_label = unit[anchor], label[anchor]
    hidden, weight = candidate[anchor, None] == candidate, None
    if label.ndim == 2:
        weight = jaccard(own_label.to(unit.dtype), label.to(unit.dtype)).masked_fill(hidden, 0.0)
        positive, takes_part = weight > 0, own_label.amax(dim=1) >= 0
    else:
        hidden = hidden | (label < 0)
        positive, takes_part = (own_label[:, None] == label) & ~hidden, own_label >= 0
    if unit_positive is None:
        hidden = hidden & ~hidden.all(dim=1, keepdim=True)  # a softmax over nothing would be NaN
    with torch.autocast(device_type=unit.device.type, enabled=False):
        logits = [(own @ unit.T).masked_fill(hidden, float('-inf'))]
        positives = [positive]
        if unit_positive is not None:
            logits.append((own * unit_positive).sum(dim=-1, keepdim=True))
            positives.append(torch.ones_like(hidden[:, :1]))
            if weight is not None and positive_weight is not None:
                weight = torch.cat([weight, positive_weight[:, None].to(weight.dtype)], dim=1)
        if unit_negative is not None:
            negative = (own * unit_negative).sum(dim=-1, keepdim=True)
            logits.append(
                negative if has_negative is None else negative.masked_fill(~has_negative[:, None], float('-inf'))
            )
            positives.append(torch.zeros_like(hidden[:, :1]))
        positive = torch.cat(positives, dim=1)
        log_p = (torch.cat(logits, dim=1) / temperature).log_softmax(dim=1).masked_fill(~positive, 0.0)
        pair_loss = torch.expm1(log_p) * log_p if focal else -log_p
        total = positive.sum(dim=1).clamp(min=1)
        if weight is not None:
            pair_loss = pair_loss * F.pad(weight, (0, pair_loss.shape[1] - weight.shape[1]))
            total = weight.sum(dim=1)
            total = total.masked_fill(total == 0, 1.0)
        return (pair_loss.sum(dim=1) / total).masked_fill(~takes_part, 0.0)
