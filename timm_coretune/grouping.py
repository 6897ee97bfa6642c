"""What timm's optimizer factory asks a model, asked of a module around it"""

from typing import Callable, Dict, Set, Union

import torch.nn as nn
from timm.models import group_parameters


def no_weight_decay(model: nn.Module, prefix: str) -> Set[str]:
    """Names of the parameters that a model wants no weight decay for, as a module around it calls them."""
    names = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    return {prefix + name for name in names}


def group_matcher(
    model: nn.Module,
    prefix: str,
    coarse: bool = False,
    own_layer: bool = False,
) -> Union[Dict, Callable[[str], int]]:
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
