"""SimCLR and MoCo v2 of any timm model without a classifier, with the keys of a run of the authors."""

import copy
from typing import Dict

import torch
import torch.nn.functional as F
from torch import nn

from timm_coretune.timm_model import get_feature_dim

PROJECTION_SIZE = 128


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Loss of SimCLR (arXiv 2002.05709, equation 1): each view has to find the other one of its picture.

    Args:
        first: Projections (batch, size) of a view of each picture, of length 1.
        second: Those of another view of the same pictures.
        temperature: Divisor of the similarities.
    """
    views = torch.cat([first, second])
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    logits = (views @ views.T / temperature).masked_fill(itself, float('-inf'))
    return F.cross_entropy(logits, torch.arange(len(views), device=views.device).roll(len(first)))


def create_encoder(backbone: nn.Module) -> nn.Sequential:
    """Adds the head of both methods, a network of two layers."""
    size = get_feature_dim(backbone)
    return nn.Sequential(backbone, nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, PROJECTION_SIZE)))


def name_tensors(encoder: nn.Sequential, backbone: str, head: str) -> Dict[str, torch.Tensor]:
    """Returns the tensors of an encoder with other starts of their keys."""
    pairs = zip((backbone, head), encoder, strict=True)
    return {start + key: value for start, part in pairs for key, value in part.state_dict().items()}


class SimCLR(nn.Module):
    """SimCLR. The loss has both views of all pictures of a batch as its negatives."""

    def __init__(self, backbone: nn.Module, temperature: float) -> None:
        super().__init__()
        self.encoder = create_encoder(backbone)
        self.temperature = temperature

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Returns the loss of two views of the same pictures."""
        projections = F.normalize(self.encoder(torch.cat([first, second])).float(), dim=1)
        return nt_xent(*projections.chunk(2), self.temperature)

    def export(self) -> Dict[str, torch.Tensor]:
        """Returns all tensors under the names of Spijkervet/SimCLR."""
        return name_tensors(self.encoder, 'encoder.', 'projector.')


class MoCo(nn.Module):
    """MoCo v2 (arXiv 1911.05722 and 2003.04297): momentum contrast with a queue of past keys.

    Args:
        backbone: A timm model without a classifier.
        temperature: Divisor of the similarities.
        queue_size: Number of keys kept as negatives.
        encoder_momentum: Share of the old key encoder that an update keeps.
        bn_groups: Parts of a batch whose BN statistics are taken apart.
        generator: Source of every random draw, except for the initial weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        temperature: float,
        queue_size: int,
        encoder_momentum: float,
        bn_groups: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.temperature, self.encoder_momentum, self.bn_groups = temperature, encoder_momentum, bn_groups
        self.generator = generator
        self.encoder = create_encoder(backbone)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        queue = torch.randn(PROJECTION_SIZE, queue_size, generator=generator)
        self.register_buffer('queue', F.normalize(queue, dim=0))
        self.register_buffer('queue_ptr', torch.zeros(1, dtype=torch.long))

    def forward(self, query_view: torch.Tensor, key_view: torch.Tensor) -> torch.Tensor:
        """Returns the InfoNCE loss of two views of the same pictures and puts the keys into the queue."""
        queries = self._encode(self.encoder, query_view)
        with torch.no_grad():
            for key, query in zip(self.key_encoder.parameters(), self.encoder.parameters(), strict=True):
                key.lerp_(query.detach(), 1 - self.encoder_momentum)
            # A positive pair is in the current batch and the negatives are in past ones, so common BN statistics would
            # give the positive away. The paper shuffles the keys among the GPUs; one process does the same among parts
            # of the batch: query and key of a picture are then normalised in the company of different pictures.
            order = torch.randperm(len(key_view), generator=self.generator).to(key_view.device)
            keys = self._encode(self.key_encoder, key_view[order])[order.argsort()]
        positive = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.clone()], dim=1) / self.temperature
        start = int(self.queue_ptr)
        self.queue[:, start : start + len(keys)] = keys.T
        self.queue_ptr[0] = (start + len(keys)) % self.queue.shape[1]
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    def _encode(self, encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(torch.cat([encoder(part) for part in x.chunk(self.bn_groups)]).float(), dim=1)

    def export(self) -> Dict[str, torch.Tensor]:
        """Returns all tensors under the names of facebookresearch/moco, as DDP leaves them behind."""
        query = name_tensors(self.encoder, 'module.encoder_q.', 'module.encoder_q.fc.')
        key = name_tensors(self.key_encoder, 'module.encoder_k.', 'module.encoder_k.fc.')
        return {**query, **key, 'module.queue': self.queue, 'module.queue_ptr': self.queue_ptr}
