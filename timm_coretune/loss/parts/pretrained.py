"""Copies of a model that its loss keeps: as it was before tuning, all of it or its weights, or following it slowly"""

import copy
from typing import Any, List, Sequence, Tuple

import torch
import torch.nn as nn

from ...timm_model import classifier_parameters, forward_maps, get_classifiers


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
    """A copy of a timm classifier that gives the input of its classifier, which the copy leaves out.

    Args:
        model: The model to copy.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        classifiers = {id(classifier) for classifier in get_classifiers(self.model)}
        for parent in list(self.model.modules()):
            for name, child in parent.named_children():
                if id(child) in classifiers:
                    setattr(parent, name, nn.Identity())

    @torch.no_grad()
    def forward(self, input: Any) -> torch.Tensor:
        """Features (B, D) of images (B, 3, H, W), or of whatever else the model takes."""
        return self.model(input).flatten(1)

    @torch.no_grad()
    def forward_maps(self, input: torch.Tensor, indices: Sequence[int]) -> Tuple[List[torch.Tensor], torch.Tensor]:
        """Averages (B, D_l) of the feature maps at these indices, and the features (B, D)."""
        feature_map, maps = forward_maps(self.model, input, indices)
        return maps, self.model.forward_head(feature_map).flatten(1)


class MomentumEncoder(PretrainedFeatures):
    """A copy of a timm classifier, without its classifier, that follows it slowly. With a copy of a projector.

    It is in evaluation mode, so its norms use the running statistics of the model, which it copies.

    Args:
        model: The model to copy.
        projector: Maps the features of the model.
        momentum: Share of the old weights in the new ones.
    """

    def __init__(self, model: nn.Module, projector: nn.Module, momentum: float):
        super().__init__(model)
        self.projector = copy.deepcopy(projector).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def follow(self, model: nn.Module, projector: nn.Module) -> None:
        """Take a step towards a model and its projector. Buffers are copied."""
        for own, other in ((self.model, model), (self.projector, projector)):
            parameters, buffers = dict(other.named_parameters()), dict(other.named_buffers())
            for name, parameter in own.named_parameters():
                parameter.lerp_(parameters[name].to(parameter.dtype), 1.0 - self.momentum)
            for name, buffer in own.named_buffers():
                buffer.copy_(buffers[name])


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
