"""Focal supervised contrastive loss

Paper: `Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning`
    - Yifan Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2102.06605
Without extra positives and negatives and without the focal factor it is SupCon:
    - Prannay Khosla et al., NeurIPS 2020, https://arxiv.org/abs/2004.11362

Written from the papers. Unlike in the released code of Core-tuning, labels are compared rather than hashed, the mean is
over the positives, and only clean images are anchors.
"""

from typing import Optional

import torch
import torch.nn as nn

from ..checks import check_features, check_target
from ..mining import hard_label, normalize


class FocalSupConLoss(nn.Module):
    """Pulls images of one class together, weighting each positive by how badly it is predicted.

    For an anchor i, p_ij is the softmax of v_i.v_j / temperature over the candidates A_i. The loss -(1 - p_ij) log p_ij
    is averaged over the positives P_i, then over all anchors. A_i is the rest of the batch, and the anchor's extra
    positive and negative. P_i is the rest of the anchor's class in the batch, and its extra positive. An anchor without
    positives counts as 0. Gradients flow through (1 - p_ij) too. At chance the loss without it is near ln |A_i|.

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
    ) -> torch.Tensor:
        """The loss of each anchor, for embeddings of unit length in float32 or float64. Arguments are not checked.

        Args:
            unit: Embeddings of the batch (N, P).
            label: Class index of each embedding (N,) int64, negative for those that take no part.
            unit_positive: Extra positive of each anchor (B, P).
            unit_negative: Extra negative of each anchor (B, P).
            has_negative: False for anchors whose extra negative does not exist (B,) bool.
            anchor: Rows of the batch that are anchors (B,) int64. When None, all rows in order.

        Returns:
            Loss of each anchor in nats (B,), 0 for those that take no part.
        """
        candidate = torch.arange(unit.shape[0], device=unit.device)
        anchor = candidate if anchor is None else anchor
        own = unit.index_select(0, anchor)
        own_label = label.index_select(0, anchor)
        hidden = (anchor[:, None] == candidate) | (label < 0)
        positive = (own_label[:, None] == label) & ~hidden
        if unit_positive is None:
            hidden = hidden & ~hidden.all(dim=1, keepdim=True)  # a softmax over nothing would be NaN
        with torch.autocast(device_type=unit.device.type, enabled=False):
            logits = [(own @ unit.T).masked_fill(hidden, float('-inf'))]
            positives = [positive]
            if unit_positive is not None:
                logits.append((own * unit_positive).sum(dim=-1, keepdim=True))
                positives.append(torch.ones_like(hidden[:, :1]))
            if unit_negative is not None:
                negative = (own * unit_negative).sum(dim=-1, keepdim=True)
                logits.append(
                    negative if has_negative is None else negative.masked_fill(~has_negative[:, None], float('-inf'))
                )
                positives.append(torch.zeros_like(hidden[:, :1]))
            positive = torch.cat(positives, dim=1)
            log_p = (torch.cat(logits, dim=1) / self.temperature).log_softmax(dim=1).masked_fill(~positive, 0.0)
            pair_loss = torch.expm1(log_p) * log_p if self.focal else -log_p
            per_anchor = pair_loss.sum(dim=1) / positive.sum(dim=1).clamp(min=1)
            return per_anchor.masked_fill(own_label < 0, 0.0)
