"""The losses of every method as plain loops in float64, one small file a method, written from the formulas alone

`methods/<name>.py`, with - as _, defines `expected(step)`. Of a loss it reads the settings, the buffers and the weights
of its layers, and never calls it.
"""

import copy
from importlib import import_module
from typing import Any, Dict, NamedTuple

import torch
from reference import array, classes, cross_entropy, soft_target


class Step(NamedTuple):
    """A step of training, before its loss is computed.

    Attributes:
        criterion: The loss.
        model: The model.
        pretrained: Weights of the model before the first update, by name.
        num_done: Updates before this one.
        num_updates: Updates of the whole run.
        input: Images.
        features: Their features.
        logits: Their logits.
        target: Their class indices or soft targets.
    """

    criterion: Any
    model: torch.nn.Module
    pretrained: Dict[str, torch.Tensor]
    num_done: int
    num_updates: int
    input: torch.Tensor
    features: torch.Tensor
    logits: torch.Tensor
    target: torch.Tensor


def expected_losses(method: str, step: Step) -> Dict[str, float]:
    return import_module(f'methods.{method.replace("-", "_")}').expected(step)


def clean_cross_entropy(step: Step) -> float:
    """Mean over the rows with a class."""
    rows = [i for i, y in enumerate(classes(step.target)) if y >= 0]
    logits, target = array(step.logits)[rows], step.target[rows]
    if not rows:
        return 0.0
    return cross_entropy(list(logits), soft_target(target, logits.shape[1], step.criterion.label_smoothing))


def features_with(step: Step, weights: Dict[str, torch.Tensor]) -> torch.Tensor:
    """Features of the images by the model with other weights, in evaluation mode."""
    model: Any = copy.deepcopy(step.model).eval()
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model.forward_head(model.forward_features(step.input), pre_logits=True)
