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

from ..checks import check_features, check_target, is_in_functorch
from ..mining import hard_label, normalize
from .parts.dense_contrast import dense_contrast
from .streaming import streaming_contrast

# Number of similarities from which on they are computed block by block. With 2,048 x 2,048 of them that takes less than
# half of the processor's time, and a seventh of the memory (docs/cost.md).
DENSE_BELOW = 2**22


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
        anchor: Optional[slice] = None,
        positive_weight: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The loss of each anchor, for embeddings of unit length in float32 or float64. Arguments are not checked.

        With class indices and B * N of DENSE_BELOW or more, the matrix of similarities is computed block by block, in
        the forward and in the backward pass. The result is exact, and memory is O(N x block). With label sets, below
        that size and under torch.func the whole matrix is kept. So it is for a second derivative (create_graph=True).

        Args:
            unit: Embeddings of the batch (N, P).
            label: Class index of each embedding (N,) int64, negative for those that take no part. Or label sets (N, C)
                as for `mining.label_sets`, which all take part.
            unit_positive: Extra positive of each anchor (B, P).
            unit_negative: Extra negative of each anchor (B, P).
            has_negative: False for anchors whose extra negative does not exist (B,) bool.
            anchor: The B rows of the batch that are anchors, a slice without step. When None, all rows.
            positive_weight: Jaccard index of each anchor and its extra positive (B,). Required with label sets and
                extra positives.

        Returns:
            Loss of each anchor in nats (B,), 0 for those that take no part.
        """
        anchor = slice(0, unit.shape[0]) if anchor is None else anchor
        arguments = (unit, label, anchor, unit_positive, unit_negative, has_negative, self.temperature, self.focal)
        num_anchors = label[anchor].shape[0]
        if label.ndim == 1 and num_anchors * unit.shape[0] >= DENSE_BELOW and not is_in_functorch(unit, label):
            return streaming_contrast(*arguments)
        return dense_contrast(*arguments, positive_weight)
