"""Cross-entropy + weight x a supervised contrastive loss of projected features: the frame of several methods"""

from typing import Any, Dict, Optional, Union

import torch
import torch.nn as nn

from ...distributed import GlobalBatch
from ...timm_model import resolve_num_features
from ..base import TaskLoss
from .projection import ProjectionHead, check_widths


class ContrastiveLoss(TaskLoss):
    """Base class of losses that add a contrastive loss to the cross-entropy. A subclass defines `per_anchor`.

    With several processes the rows of all are contrasted, and each process averages over its own anchors.

    Args:
        num_features: Width D of the pre-logits features, or the model.
        contrast_weight: Weight of the contrastive loss, > 0.
        temperature: Temperature of the contrastive loss, which divides cosine similarities, > 0.
        projection_dim: Width P of the embedding that the contrastive loss compares.
        **kwargs: Arguments of TaskLoss.

    Raises:
        ValueError: An argument is out of its range.
    """

    contrasts = True

    def __init__(
        self,
        num_features: Union[int, nn.Module],
        contrast_weight: float = 0.1,
        temperature: float = 0.07,
        projection_dim: int = 256,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        num_features = resolve_num_features(num_features)
        check_widths(num_features, projection_dim)
        if not contrast_weight > 0.0 or not temperature > 0.0:
            raise ValueError(
                f'Expected contrast_weight and temperature > 0, got {contrast_weight} and {temperature}. Without '
                'contrast this method is plain cross-entropy.'
            )
        self.num_features = num_features
        self.contrast_weight = contrast_weight
        self.temperature = temperature
        self.projector = ProjectionHead(num_features, projection_dim)

    def extra_repr(self) -> str:
        return f'contrast_weight={self.contrast_weight}, temperature={self.temperature}'

    def per_anchor(self, unit: torch.Tensor, label: torch.Tensor, anchor: slice) -> torch.Tensor:
        """The contrastive loss of each anchor in nats (B,), 0 for those that take no part or have no positive.

        Args:
            unit: Embeddings of unit length of all rows (N, P) in float32 or float64.
            label: Class of each row (N,) int64, negative for those that take no part. With multi_label the label sets
                (N, C), see `mining.label_sets`.
            anchor: The B rows that are anchors, those of this process.
        """
        raise NotImplementedError(f'{type(self).__name__} must define per_anchor().')

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        batch: GlobalBatch = prepared[0]
        _, unit = self.projector(features)
        everyone = batch.gather_together(label=self.labels_of(target), unit=unit)
        label, unit = everyone['label'], everyone['unit']
        task_loss = self.cross_entropy(logits, target, label, batch, clean_loss)
        contrast_loss = batch.mean(self.per_anchor(unit, label, batch.own).sum(), label)
        return {
            'loss': self.weigh(task_loss, contrast_loss),
            'task_loss': task_loss,
            'contrast_loss': contrast_loss,
        }

    def weigh(self, task_loss: torch.Tensor, contrast_loss: torch.Tensor) -> torch.Tensor:
        """The loss to minimise."""
        return task_loss + self.contrast_weight * contrast_loss
