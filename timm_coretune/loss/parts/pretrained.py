"""A frozen copy of the model as it was before tuning"""

import copy

import torch.nn as nn


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
