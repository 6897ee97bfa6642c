"""The model as it was before tuning: a frozen copy of all of it, or of its weights only"""

import copy
from typing import List, Tuple

import torch
import torch.nn as nn

from ...timm_model import classifier_parameters


class PretrainedCopy(nn.Module):
    """A copy of a model that stays as it is: in evaluation mode, without gradients, also when its owner trains.

    It is part of the state of the loss that owns it, so a resumed run compares with the same weights. An EMA of the
    model and its loss holds a copy of it too.

    Args:
        model: The model to copy.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> 'PretrainedCopy':
        return super().train(False)


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
