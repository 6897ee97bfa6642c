"""Balanced contrastive learning (BCL)

Paper: `Balanced Contrastive Learning for Long-Tailed Visual Recognition`
    - Jianggang Zhu et al., CVPR 2022, https://arxiv.org/abs/2207.09052

Written from the formula. Left out are the class centres, which the paper adds to each batch so that no class is
missing, the logit compensation of its cross-entropy, and its two further views of each image.
"""

import math
from typing import Any, Union

import torch
import torch.nn as nn

from .parts.contrastive import ContrastiveLoss


class BCLLoss(ContrastiveLoss):
    """Cross-entropy + contrast_weight x a contrastive loss in which every class of the batch weighs alike.

    For an anchor i and a positive p the loss is -log e^{s_ip / t} / sum over classes c of mean over k in c of
    e^{s_ik / t}, where s is the cosine similarity and t the temperature. It is averaged over the positives, then over
    all anchors. The anchor is in no mean: that of its own class is over the others of its class. An anchor without
    positives counts as 0. At chance the loss is near the logarithm of the number of classes in the batch.

    A step costs as much as one of SCL. Where all classes of the batch are equally frequent, the two differ little.

    Args:
        num_features: Width D of the pre-logits features, or the model.
        contrast_weight: Weight of the contrastive loss, > 0. 0.35 is that of the released code.
        **kwargs: Arguments of ContrastiveLoss and TaskLoss.
    """

    for_multi_label = False

    def __init__(self, num_features: Union[int, nn.Module], contrast_weight: float = 0.35, **kwargs: Any):
        super().__init__(num_features, contrast_weight, **kwargs)

    def per_anchor(self, unit: torch.Tensor, label: torch.Tensor, anchor: slice) -> torch.Tensor:
        candidate = torch.arange(unit.shape[0], device=unit.device)
        own_label = label[anchor]
        hidden = (candidate[anchor, None] == candidate) | (label < 0)
        positive = (own_label[:, None] == label) & ~hidden
        class_size = (label[:, None] == label).sum(dim=0) - positive.long()  # (B, N), without the anchor
        hidden = hidden & ~hidden.all(dim=1, keepdim=True)  # a logarithm of a sum of nothing would be NaN
        with torch.autocast(device_type=unit.device.type, enabled=False):
            logits = unit[anchor] @ unit.T / self.temperature
            shares = logits - class_size.clamp(min=1).to(logits.dtype).log()
            log_sum = shares.masked_fill(hidden, -math.inf).logsumexp(dim=1, keepdim=True)
            pair_loss = (log_sum - logits).masked_fill(~positive, 0.0)
            per_anchor = pair_loss.sum(dim=1) / positive.sum(dim=1).clamp(min=1)
            return per_anchor.masked_fill(own_label < 0, 0.0)
