"""Projection head: maps features to the embedding that the contrastive loss compares"""

from typing import Optional, Tuple, cast

import torch
import torch.nn as nn

from ...mining import normalize


def check_widths(num_features: int, projection_dim: int) -> None:
    """Raise a ValueError if there can be no projection head of these widths."""
    if num_features < 1 or projection_dim < 1:
        raise ValueError(
            f'Expected num_features and projection_dim >= 1, got {num_features} and {projection_dim}. num_features '
            'is the width before the classifier: model.num_features, or model.head_hidden_size where it exists.'
        )


class ProjectionHead(nn.Module):
    """Linear, ReLU, Linear: maps features to the embedding of the contrastive loss. It is dropped after training.

    Args:
        num_features: Width D of the features and of the hidden layer.
        projection_dim: Width P of the embedding.
    """

    def __init__(self, num_features: int, projection_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(num_features, num_features)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(num_features, projection_dim)

    def forward(
        self,
        features: Optional[torch.Tensor] = None,
        hidden: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Embed features (N, D), or outputs of the first layer (N, D), such as mixtures of them.

        The first layer is affine, so its output for a mixture is the mixture of its outputs.

        Returns:
            The outputs of the first layer (N, D), and the embeddings (N, P) of unit length in float32 or float64.
        """
        if hidden is None:
            hidden = self.fc1(cast(torch.Tensor, features).to(self.fc1.weight.dtype))
        return hidden, normalize(self.fc2(self.act(hidden)))
