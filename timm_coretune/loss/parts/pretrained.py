"""Copies of a model that its loss keeps: as it was before tuning, all of it or its weights, or following it slowly"""

import copy
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ...timm_model import classifier_parameters
from .forward import ClassifierInput, features_and_logits, forward_maps


class PretrainedCopy(nn.Module):
    """A copy of a model that stays as it is: in evaluation mode, without gradients, also when its owner trains.

    It is part of the state of the loss that owns it, so a resumed run compares with the same weights. An EMA of the
    model and its loss holds a copy of it too.

    Args:
        model: The model to copy.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = copy.deepcopy(model).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> 'PretrainedCopy':
        return super().train(False)


class PretrainedFeatures(PretrainedCopy):
    """A copy of a timm classifier that gives its features, as the task gives those of the model.

    Args:
        model: The model to copy.
        num_features: Width D of the features.
    """

    def __init__(self, model: nn.Module, num_features: Optional[int]):
        super().__init__(model)
        self.num_features = num_features
        self.classifier_input = ClassifierInput()
        self.classifier_input.listen_to(self.model.get_classifier())

    @torch.no_grad()
    def forward(self, input: Any) -> torch.Tensor:
        """Features (B, D) of images (B, 3, H, W), or of a dictionary of patches."""
        feature_map = None if isinstance(input, dict) else self.model.forward_features(input)
        return features_and_logits(self.model, input, feature_map, self.classifier_input, self.num_features)[0]

    @torch.no_grad()
    def forward_maps(self, input: torch.Tensor, indices: Sequence[int]) -> Tuple[List[torch.Tensor], torch.Tensor]:
        """Averages (B, D_l) of the feature maps at these indices, and the features (B, D)."""
        feature_map, maps = forward_maps(self.model, input, indices)
        features, _ = features_and_logits(self.model, input, feature_map, self.classifier_input, self.num_features)
        return maps, features


class MomentumEncoder(PretrainedFeatures):
    """A copy of a timm classifier that follows it slowly, with a copy of a projector.

    It is in evaluation mode, so its norms use the running statistics of the model, which it copies.

    Args:
        model: The model to copy.
        projector: Maps the features of the model.
        momentum: Share of the old weights in the new ones.
        num_features: Width D of the features.
    """

    def __init__(self, model: nn.Module, projector: nn.Module, momentum: float, num_features: Optional[int]):
        super().__init__(model, num_features)
        self.projector = copy.deepcopy(projector).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def follow(self, model: nn.Module, projector: nn.Module) -> None:
        """Take a step towards a model and its projector. Buffers are copied."""
        for own, other in ((self.model, model), (self.projector, projector)):
            for parameter, target in zip(own.parameters(), other.parameters(), strict=True):
                parameter.lerp_(target.to(parameter.dtype), 1.0 - self.momentum)
            for buffer, new in zip(own.buffers(), other.buffers(), strict=True):
                buffer.copy_(new)


class PretrainedWeights(nn.Module):
    """A copy of the weights of a model that are not new: all but those of its classifier, and of its decoder.

    Like PretrainedCopy it is part of the state of the loss that owns it, but without buffers and modules.

    Args:
        model: The model whose weights are copied.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        new = {id(p) for p in classifier_parameters(model)}
        self.names = [name for name, p in model.named_parameters() if id(p) not in new]
        # one tensor, as names with dots cannot be registered; no buffer, as DistributedDataParallel sends those about
        # in every step
        copies = [model.get_parameter(name).detach().flatten() for name in self.names]
        self.flat = nn.Parameter(torch.cat(copies), requires_grad=False)

    def pairs(self, model: nn.Module) -> List[Tuple[nn.Parameter, torch.Tensor]]:
        """Each of these weights of a model now, and what it was before tuning, in the same shape."""
        now = dict(model.named_parameters())
        tuned = [now[name] for name in self.names]
        parts = self.flat.split([p.numel() for p in tuned])
        return [(p, part.view(p.shape)) for p, part in zip(tuned, parts, strict=True)]
