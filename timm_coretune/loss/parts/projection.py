"""Projection head: maps features to the embedding that the contrastive loss compares"""

from typing import Optional, Sequence

import torch
import torch.nn as nn

from ...distributed import GlobalBatch
from ...mining import normalize
from ...mixup import Mixture


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
        mixtures: Sequence[Mixture] = (),
        batch: Optional[GlobalBatch] = None,
    ) -> torch.Tensor:
        """Embed features (B, D), and M mixtures of them, as unit vectors ((1 + M) * B, P) in float32 or float64.

        The first layer is affine, so its output for a mixture is the mixture of its outputs. It is therefore computed
        for B rows only. Indices in mixtures refer to rows of the global batch.
        """
        hidden = self.fc1(features.to(self.fc1.weight.dtype))
        if mixtures:
            all_hidden = hidden if batch is None else batch.gather(hidden)
            hidden = torch.cat([hidden, *[mixture.mix(all_hidden) for mixture in mixtures]])
        return normalize(self.fc2(self.act(hidden)))
