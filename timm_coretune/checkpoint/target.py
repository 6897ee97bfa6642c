"""What a file has to fill of a model"""

import sys
from typing import Callable, Dict, FrozenSet, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from ..timm_model import classifier_parameters


class Target(NamedTuple):
    """The tensors of a model, and how timm reads original files of its architecture.

    Attributes:
        shapes: Shape of each tensor of the model.
        dtypes: Its dtype.
        backbone: Tensors that the file must have.
        classifier: Tensors of the classifier.
        fresh: Norms that timm puts after the pooling instead of before it: a file trained otherwise lacks them.
        filter_fn: timm's own reader of the original files of this architecture.
        first_conv: Convolutions over the input's channels.
        model: The model itself.
    """

    shapes: Dict[str, torch.Size]
    dtypes: Dict[str, torch.dtype]
    backbone: FrozenSet[str]
    classifier: FrozenSet[str]
    fresh: FrozenSet[str]
    filter_fn: Optional[Callable]
    first_conv: Tuple[str, ...]
    model: nn.Module


def create_target(model: nn.Module) -> Target:
    """Describe a model for the search."""
    state = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    classifying = {id(p) for p in classifier_parameters(model)}
    classifier = frozenset(name for name, p in model.named_parameters() if id(p) in classifying)
    fresh = frozenset(name for name in shapes if name.startswith('fc_norm.'))
    # BatchNorm's counters are not in files converted from elsewhere, and no forward pass uses them
    counters = {name for name in shapes if name.endswith('num_batches_tracked')}
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__ if cls.__module__.startswith('timm.'))
    filter_fn = next((m.checkpoint_filter_fn for m in modules if hasattr(m, 'checkpoint_filter_fn')), None)
    first_conv = (getattr(model, 'pretrained_cfg', None) or {}).get('first_conv') or ()
    return Target(
        shapes,
        {name: tensor.dtype for name, tensor in state.items()},
        frozenset(shapes) - classifier - fresh - counters,
        classifier,
        fresh,
        filter_fn,
        (first_conv,) if isinstance(first_conv, str) else tuple(first_conv),
        model,
    )
