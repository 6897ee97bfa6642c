"""Projection head: maps features to the embedding that the contrastive loss compares"""

from typing import Optional

import torch
import torch.nn as nn

from ..distributed import GlobalBatch
from ..mining import normalize
from ..mixup import HardMixtures


class ProjectionHead(nn.Module):
    """Linear, ReLU, Linear: maps features to the embedding of the contrastive loss. It is dropped after training.

    Args:
        num_features: Width D of the features and of the hidden layer.
        projection_dim: Width P of the embedding.
    """

    def __init__(self, num_features: int, projection_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(num_features, num_features)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(num_features, projection_dim)

    def forward(
        self,
        features: torch.Tensor,
        mixtures: Optional[HardMixtures] = None,
        batch: Optional[GlobalBatch] = None,
    ) -> torch.Tensor:
        """Embed features (B, D), and their mixtures if given, as unit vectors (B or 3B, P) in float32 or float64.

        The first layer is affine, so its output for a mixture is the mixture of its outputs. It is therefore computed
        for B rows only. Indices in mixtures refer to rows of the global batch.
        """
        hidden = self.fc1(features.to(self.fc1.weight.dtype))
        if mixtures is not None:
            all_hidden = hidden if batch is None else batch.gather(hidden)
            hidden = torch.cat([hidden, mixtures.positive.mix(all_hidden), mixtures.negative.mix(all_hidden)])
        return normalize(self.fc2(self.act(hidden)))
