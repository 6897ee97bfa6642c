"""Supervised contrastive learning beside cross-entropy (SCL)

Papers: `Supervised Contrastive Learning`
    - Prannay Khosla et al., NeurIPS 2020, https://arxiv.org/abs/2004.11362
`Supervised Contrastive Learning for Pre-trained Language Model Fine-tuning`, which adds it to the cross-entropy
    - Beliz Gunel et al., ICLR 2021, https://arxiv.org/abs/2011.01403
"""

from typing import Any, Union

import torch
import torch.nn as nn

from .focal_supcon import FocalSupConLoss
from .parts.contrastive import ContrastiveLoss


class SCLLoss(ContrastiveLoss):
    """Cross-entropy + contrast_weight x SupCon.

    Args:
        num_features: Width D of the pre-logits features, or the model.
        **kwargs: Arguments of ContrastiveLoss and TaskLoss.
    """

    def __init__(self, num_features: Union[int, nn.Module], **kwargs: Any):
        super().__init__(num_features, **kwargs)
        self.contrast = FocalSupConLoss(self.temperature, focal=False)

    def per_anchor(self, unit: torch.Tensor, label: torch.Tensor, anchor: slice) -> torch.Tensor:
        return self.contrast.per_anchor(unit, label, anchor=anchor)
