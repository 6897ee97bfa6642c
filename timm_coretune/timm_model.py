"""A timm model seen from outside: its classifier, the width of its features, its groups of parameters"""

from typing import Any, Callable, Dict, List, Set, Union

import torch.nn as nn
from timm.models import group_parameters

GroupMatcher = Union[Dict[str, Any], Callable[[str], int]]  # what timm's optimizer factory takes


def get_classifiers(model: nn.Module) -> List[nn.Module]:
    """The modules that `get_classifier()` names, a list also where it names one, as most models do, or none."""
    if not getattr(model, 'num_classes', 0):
        return []
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, (tuple, list, nn.ModuleList)) else [classifiers]
    return [classifier for classifier in classifiers if isinstance(classifier, nn.Module)]


def classifier_parameters(model: nn.Module) -> List[nn.Parameter]:
    """Their parameters."""
    return [p for classifier in get_classifiers(model) for p in classifier.parameters()]


def check_classifier(model: nn.Module) -> None:
    """Raise a ValueError unless the model is a timm classifier."""
    num_classes = getattr(model, 'num_classes', None)
    if not num_classes or not hasattr(model, 'forward_head') or not hasattr(model, 'get_classifier'):
        raise ValueError(
            f'Expected a timm classifier with forward_features, forward_head and num_classes > 0, got '
            f'{type(model).__name__} with num_classes={num_classes}. Create the model with num_classes=<your classes>.'
        )


def get_feature_dim(model: nn.Module) -> int:
    """Width of the pre-logits features of a timm classifier.

    Raises:
        ValueError: The model does not tell the width.
    """
    feature_dim = getattr(model, 'head_hidden_size', None) or getattr(model, 'num_features', None)
    if not feature_dim:
        raise ValueError(
            f'{type(model).__name__} has neither head_hidden_size nor num_features, the width before its classifier. '
            'Pass criterion=CoreTuningLoss(num_features=...).'
        )
    return feature_dim


def no_weight_decay(model: nn.Module, prefix: str) -> Set[str]:
    """Names of the parameters that a model wants no weight decay for, as a module around it calls them."""
    names = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    return {prefix + name for name in names}


def group_matcher(
    model: nn.Module,
    prefix: str,
    coarse: bool = False,
    own_layer: bool = False,
) -> GroupMatcher:
    """Layer of a parameter by its name, for layer decay; whatever is around the model is in its last layer.

    Args:
        model: A timm model.
        prefix: What its parameters' names have in front in the module around it.
        coarse: Layers as coarse as the model makes them.
        own_layer: What is around the model is in a layer of its own, behind the last that trains.
    """
    if not hasattr(model, 'group_matcher'):
        return {}
    layer_map = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    last_layer = max(layer_map.values(), default=0)
    if own_layer:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        last_layer = 1 + max((layer for name, layer in layer_map.items() if name in trained), default=-1)

    def _matcher(name: str) -> int:
        if name.startswith(prefix):
            return min(layer_map.get(name[len(prefix) :], last_layer), last_layer)
        return last_layer

    return _matcher
