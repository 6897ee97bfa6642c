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
    has_head: bool = True,
) -> Union[Dict, Callable[[str], int]]:
    """Layer of a parameter by its name, for layer decay; whatever is around the model is in the layer of its head.

    Args:
        model: A timm model.
        prefix: What its parameters' names have in front in the module around it.
        coarse: Layers as coarse as the model makes them.
        has_head: Its last layer is its head. Otherwise what is around the model is, and comes after all its layers.
    """
    if not hasattr(model, 'group_matcher'):
        return {}
    layer_map = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    last_layer = max(layer_map.values(), default=0) + (not has_head)

    def _matcher(name: str) -> int:
        if name.startswith(prefix):
            return layer_map.get(name[len(prefix) :], last_layer)
        return last_layer

    return _matcher
