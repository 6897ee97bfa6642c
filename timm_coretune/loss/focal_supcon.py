"""Focal supervised contrastive loss

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605
Without extra positives and negatives and without the focal factor it is SupCon:
    - Prannay Khosla et al., NeurIPS 2020, https://arxiv.org/abs/2004.11362

Images with several labels are weighted by their Jaccard index, see `FocalSupConLoss`. For texts such weights are in:
    - Nankai Lin et al., 2022, https://arxiv.org/abs/2212.00552

Written from the papers. Unlike in the released code of Core-tuning, labels are compared rather than hashed, the mean is
over the positives, and only clean images are anchors.
"""

from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..checks import check_features, check_target
from ..mining import hard_label, normalize
from ..mining.label_sets import jaccard


class FocalSupConLoss(nn.Module):
    """Pulls images of one class together, weighting each positive by how badly it is predicted.

    For an anchor i, p_ij is the softmax of v_i.v_j / temperature over the candidates A_i. The loss -(1 - p_ij) log p_ij
    is averaged over the positives P_i, then over all anchors. A_i is the rest of the batch, and the anchor's extra
    positive and negative. P_i is the rest of the anchor's class in the batch, and its extra positive. An anchor without
    positives counts as 0. Gradients flow through (1 - p_ij) too. At chance the loss without it is near ln |A_i|.

    With several labels an image, P_i are the images with a label in common, and the mean over them is weighted by the
    Jaccard index J_ij of the label sets: the weight of j is J_ij over the sum of J_ik over all positives k, the extra
    one included. The extra positive of an anchor is mixed from an image of the batch, its hardest positive, and has the
    Jaccard index of that image, as it has its weight of 1 with one label. So an anchor without any label has no
    positive, not even an extra one, and counts as 0. If all rows have one label, all indices are 0 or 1, and the loss
    is that of class indices. `per_anchor` takes such labels.

    It is called like the losses of pytorch-metric-learning: embeddings, then labels. It takes no tuple of mined pairs,
    and extras are passed by name.

    Args:
        temperature: Divides the cosine similarity, > 0. The lower it is, the more the nearest images weigh.
        focal: Weight positives by (1 - p_ij). Without it and without extras this is SupCon.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, temperature: float = 0.07, focal: bool = True):
        super().__init__()
        if not temperature > 0.0:
            raise ValueError(f'Expected temperature > 0, it divides cosines, got {temperature}. The paper uses 0.07.')
        self.temperature = temperature
        self.focal = focal

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}, focal={self.focal}'

    def forward(
        self,
        embedding: torch.Tensor,
        label: torch.Tensor,
        *,
        extra_positive: Optional[torch.Tensor] = None,
        extra_negative: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Compute the mean loss of the anchors.

        Args:
            embedding: Embeddings of the anchors (B, P), of any scale and floating dtype. They are normalised here.
            label: Class indices of an integer dtype (B,), or soft targets (B, C), whose most probable class counts.
            extra_positive: One more positive for each anchor (B, P). Other anchors do not see it.
            extra_negative: One more negative for each anchor (B, P). Other anchors do not see it.

        Returns:
            Mean over the anchors in nats, a scalar in float32 or float64. If no anchor has a positive it is 0, but
            still attached to the graph.

        Raises:
            ValueError: Shapes or dtypes do not fit.
        """
        check_features(embedding, 'embedding')
        check_target(label, embedding.shape[0])
        for name, extra in (('extra_positive', extra_positive), ('extra_negative', extra_negative)):
            if extra is not None and extra.shape != embedding.shape:
                raise ValueError(f'Expected {name} {tuple(embedding.shape)}, one per anchor, got {tuple(extra.shape)}.')
        per_anchor = self.per_anchor(
            normalize(embedding),
            hard_label(label),
            None if extra_positive is None else normalize(extra_positive),
            None if extra_negative is None else normalize(extra_negative),
        )
        return per_anchor.mean()

    def per_anchor(
        self,
        unit: torch.Tensor,
        label: torch.Tensor,
        unit_positive: Optional[torch.Tensor] = None,
        unit_negative: Optional[torch.Tensor] = None,
        has_negative: Optional[torch.Tensor] = None,
        anchor: Optional[torch.Tensor] = None,
        positive_weight: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The loss of each anchor, for embeddings of unit length in float32 or float64. Arguments are not checked.

        Args:
            unit: Embeddings of the batch (N, P).
            label: Class index of each embedding (N,) int64, negative for those that take no part. Or label sets (N, C)
                as for `mining.label_sets`, which all take part.
            unit_positive: Extra positive of each anchor (B, P).
            unit_negative: Extra negative of each anchor (B, P).
            has_negative: False for anchors whose extra negative does not exist (B,) bool.
            anchor: Rows of the batch that are anchors (B,) int64. When None, all rows in order.
            positive_weight: Jaccard index of each anchor and its extra positive (B,). Required with label sets and
                extra positives.

        Returns:
            Loss of each anchor in nats (B,), 0 for those that take no part.
        """
        candidate = torch.arange(unit.shape[0], device=unit.device)
        anchor = candidate if anchor is None else anchor
        own = unit.index_select(0, anchor)
        own_label = label.index_select(0, anchor)
        hidden, weight = anchor[:, None] == candidate, None
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
            log_p = (torch.cat(logits, dim=1) / self.temperature).log_softmax(dim=1).masked_fill(~positive, 0.0)
            pair_loss = torch.expm1(log_p) * log_p if self.focal else -log_p
            total = positive.sum(dim=1).clamp(min=1)
            if weight is not None:
                pair_loss = pair_loss * F.pad(weight, (0, pair_loss.shape[1] - weight.shape[1]))
                total = weight.sum(dim=1)
                total = total.masked_fill(total == 0, 1.0)
            return (pair_loss.sum(dim=1) / total).masked_fill(~takes_part, 0.0)
