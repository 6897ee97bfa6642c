"""Ask a timm model for its classifier, the width of its features, its tensors and its groups of parameters"""

import sys
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
    Union,
    cast,
)

import torch
import torch.nn as nn
from timm.models import group_parameters

GroupMatcher = Union[Dict[str, Any], Callable[[str], int]]  # what timm's optimizer factory takes


class _HasClassifier(Protocol):
    """The method of a timm classifier that nn.Module does not declare."""

    def get_classifier(self) -> Union[nn.Module, Sequence[nn.Module], None]: ...


def get_classifiers(model: nn.Module) -> List[nn.Module]:
    """Classifier modules of a timm model in a list.

    Most timm models have one classifier, some have several. The list is empty for a model without one.
    """
    if not getattr(model, 'num_classes', 0):
        return []
    found = cast(_HasClassifier, model).get_classifier()
    classifiers = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    return [classifier for classifier in classifiers if isinstance(classifier, nn.Module)]


def classifier_parameters(model: nn.Module) -> List[nn.Parameter]:
    """Parameters of all classifier modules of a timm model."""
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
    """Names of the parameters that a model excludes from weight decay.

    Args:
        model: A timm model.
        prefix: Start of the names of the model's parameters in the module that wraps it, '' without one.
    """
    get_names = getattr(model, 'no_weight_decay', None)
    names = get_names() if get_names is not None else ()
    return {prefix + name for name in names}


def group_matcher(
    model: nn.Module,
    prefix: str,
    coarse: bool = False,
    own_layer: bool = False,
) -> GroupMatcher:
    """Tell the layer of each parameter of a module that wraps a timm model, for layer-wise learning rate decay.

    Parameters of the wrapping module itself (a projection head, a decoder) are in the last layer of the model.

    Args:
        model: A timm model.
        prefix: Start of the names of the model's parameters in the wrapping module.
        coarse: Whether the model joins its layers into a few large ones.
        own_layer: Whether parameters of the wrapping module are in a layer of their own, which follows the last layer
            of the model with trainable parameters.

    Returns:
        Function from the name of a parameter to its layer. Empty if the model does not know its layers.
    """
    get_matcher: Optional[Callable[..., Any]] = getattr(model, 'group_matcher', None)
    if get_matcher is None:
        return {}
    layer_map = group_parameters(model, get_matcher(coarse=coarse), reverse=True)
    last_layer = max(layer_map.values(), default=0)
    if own_layer:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        last_layer = 1 + max((layer for name, layer in layer_map.items() if name in trained), default=-1)

    def _matcher(name: str) -> int:
        if name.startswith(prefix):
            return min(layer_map.get(name[len(prefix) :], last_layer), last_layer)
        return last_layer

    return _matcher


class Target(NamedTuple):
    """The tensors of a model that a checkpoint fills, and how timm reads checkpoints of its architecture.

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
