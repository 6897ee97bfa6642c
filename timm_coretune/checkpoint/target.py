"""Describe the tensors of a timm model that a checkpoint has to fill"""

import sys
from typing import Callable, Dict, FrozenSet, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from ..timm_model import classifier_parameters


class Target(NamedTuple):
    """The tensors of a model, and how timm reads checkpoints in the original format of its architecture.

    Attributes:
        shapes: Shape of each tensor of the model, by its name.
        dtypes: Dtype of each tensor of the model, by its name.
        backbone: Names of the tensors that a checkpoint must have.
        classifier: Names of the tensors of the classifier.
        fresh: Names of the tensors of a norm after the pooling (`fc_norm`). A checkpoint that was pretrained with the
            norm before the pooling lacks them, and they keep their initial values.
        filter_fn: timm's `checkpoint_filter_fn` of this architecture, which renames the tensors of original
            checkpoints. None if timm has none.
        first_conv: Names of the convolutions that see the channels of the image.
        model: The model itself.
    """

    shapes: Dict[str, torch.Size]
    dtypes: Dict[str, torch.dtype]
    backbone: FrozenSet[str]
    classifier: FrozenSet[str]
    fresh: FrozenSet[str]
    filter_fn: Optional[Callable[[Dict[str, torch.Tensor], nn.Module], Dict[str, torch.Tensor]]]
    first_conv: Tuple[str, ...]
    model: nn.Module


def create_target(model: nn.Module) -> Target:
    """Describe the tensors of a model."""
    state = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    classifying = {id(p) for p in classifier_parameters(model)}
    classifier = frozenset(name for name, p in model.named_parameters() if id(p) in classifying)
    fresh = frozenset(name for name in shapes if name.startswith('fc_norm.'))
    # the step counters of BatchNorm are optional: converted checkpoints lack them, and no forward pass uses them
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
