"""Ask a timm model for its classifier, the width of its features, its tensors and its groups of parameters"""

import logging
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
from timm.utils import unwrap_model

_logger = logging.getLogger(__name__)

GroupMatcher = Union[Dict[str, Any], Callable[[str], int]]  # what timm's optimizer factory takes


class _HasClassifier(Protocol):
    """The method of a timm classifier that nn.Module does not declare."""

    def get_classifier(self) -> Union[nn.Module, Sequence[nn.Module], None]: ...


def get_classifiers(model: nn.Module) -> List[nn.Module]:
    """Classifier modules of a timm model in a list.

    Most timm models have one classifier, some have several. The list is empty for a model without one.
    """
    if not getattr(model, 'num_classes', 0) or not hasattr(model, 'get_classifier'):
        return []  # networks of other libraries have num_classes too
    found = cast(_HasClassifier, model).get_classifier()
    classifiers = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    return [classifier for classifier in classifiers if isinstance(classifier, nn.Module)]


def classifier_parameters(model: nn.Module) -> List[nn.Parameter]:
    """Parameters of all classifier modules of a timm model."""
    return [p for classifier in get_classifiers(model) for p in classifier.parameters()]


def check_classifier(model: nn.Module) -> None:
    """Raise a ValueError unless the model is a timm classifier."""
    num_classes = getattr(model, 'num_classes', None)
    methods = ('forward_features', 'forward_head', 'get_classifier')
    missing = [name for name in methods if not hasattr(model, name)]
    if num_classes and missing:
        raise ValueError(
            f'Expected a timm classifier, got {type(model).__name__} without {", ".join(missing)}. Add the method(s) '
            'as models of timm have them, where get_classifier() returns the last layer, or use a model of timm.'
        )
    if not num_classes:
        raise ValueError(
            f'Expected a timm classifier with forward_features, forward_head and num_classes > 0, got '
            f'{type(model).__name__} with num_classes={num_classes}. Create the model with num_classes=<your classes>.'
        )


def _random_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(x.shape, generator=generator) if x.is_floating_point() else torch.zeros(x.shape, dtype=x.dtype)


class Probe(NamedTuple):
    """What a probe of a layer found.

    Attributes:
        is_affine: Whether the layer is affine. None if it takes no input of the width, in any shape.
        takes_rows: Whether the input may be a matrix (N, width), rather than feature maps of one pixel.
    """

    is_affine: Optional[bool]
    takes_rows: bool = True


@torch.no_grad()
def probe_affine(module: nn.Module, width: int) -> Probe:
    """Find out whether a module in evaluation mode is affine in its input of a width.

    It is probed with random inputs and random parameters, as a layer that starts at zero hides what comes before it.
    This happens on the CPU. The module and the global random state stay as they are.

    Args:
        module: A layer, or a small module such as a head.
        width: Width of the input.
    """
    if type(module).forward in (nn.Linear.forward, nn.Conv2d.forward, nn.Identity.forward):
        return Probe(True)
    generator = torch.Generator().manual_seed(0)
    state = {name: _random_like(p, generator) for name, p in module.named_parameters()}
    for name, buffer in module.named_buffers():
        is_known = not buffer.is_meta
        state[name] = buffer.detach().to('cpu', copy=True) if is_known else torch.ones(buffer.shape, dtype=buffer.dtype)
        if buffer.is_floating_point():
            state[name] = state[name].float()
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast('cpu', enabled=False):
            for shape in ((width,), (width, 1, 1), (1, 1, width), (1, width)):
                first, second = torch.randn(2, 16, *shape, generator=generator)
                lam = torch.rand(16, *[1] * len(shape), generator=generator)
                try:
                    mixed, a, b = (
                        torch.func.functional_call(module, state, (x,)).flatten(1)
                        for x in (torch.lerp(second, first, lam), first, second)
                    )
                except Exception:  # whatever a module raises for a shape that it does not take
                    continue
                error = (mixed - torch.lerp(b, a, lam.flatten(1))).abs().max()
                is_affine = bool(error <= 1e-3 * torch.maximum(a.abs().max(), b.abs().max()))
                return Probe(is_affine, shape == (width,))
    finally:
        for part, was_training in training.items():
            part.training = was_training
    return Probe(None)


def is_classifier_affine(model: nn.Module, width: int) -> bool:
    """Whether the classifier of a timm model is affine in its features. If not, it can be called with (N, width).

    Raises:
        ValueError: The classifier is not affine, and cannot be called with features.
    """
    # of a segmentation model, the decoder comes before the features
    layers: List[nn.Module] = []
    parts = getattr(model, 'feature_classifiers', None)
    for part in get_classifiers(model) if parts is None else parts:
        layers.extend(part if isinstance(part, nn.ModuleList) else [part])
    found = {layer: probe_affine(layer, width) for layer in layers}
    unknown = {type(layer).__name__ for layer, probe in found.items() if probe.is_affine is None}
    if unknown:
        _logger.warning(
            f'{", ".join(sorted(unknown))} of {type(model).__name__} does not take features of width {width}, so it is '
            'not known whether it is affine. It is taken to be: logits of mixtures are mixed from those of the images.'
        )
    others = [layer for layer, probe in found.items() if probe.is_affine is False]
    if not others:
        return True
    if len(layers) > 1 or not found[others[0]].takes_rows:
        raise ValueError(
            f'Expected an affine classifier, or a single one that takes features (N, {width}), got '
            f'{len(layers)} classifier(s) in {type(model).__name__}, of which {type(others[0]).__name__} is not affine '
            'and cannot classify mixed features. Use another model, or a layer that takes a matrix.'
        )
    _logger.info(f'{type(others[0]).__name__} of {type(model).__name__} is not affine: it classifies the mixtures too.')
    return False


def check_classifies_rows(model: nn.Module, width: int) -> None:
    """Raise a ValueError unless a model has a single classifier, which `classify` can call with features (N, width)."""
    classifiers = get_classifiers(model)
    probe = probe_affine(classifiers[0], width) if len(classifiers) == 1 else Probe(None)
    is_known = isinstance(classifiers[0], nn.Conv2d) or probe.takes_rows if probe.is_affine is not None else False
    if not is_known:
        raise ValueError(
            f'Expected a model with one classifier that takes features (N, {width}), got {type(model).__name__} with '
            f'{", ".join(type(classifier).__name__ for classifier in classifiers) or "none"}. Use another model, or '
            'another loss.'
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


def resolve_num_features(num_features: Union[int, nn.Module]) -> int:
    """The width of the features that a loss was given: a number, or the model whose pre-logits features they are.

    Raises:
        ValueError: The model does not tell the width.
    """
    return get_feature_dim(unwrap_model(num_features)) if isinstance(num_features, nn.Module) else num_features


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
        state: Tensors of the model by their names: its parameters and buffers themselves.
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

    state: Dict[str, torch.Tensor]
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
    state = model.state_dict(keep_vars=True)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    names = {id(tensor): name for name, tensor in reversed(state.items())}  # the first name of a shared parameter
    classifier = frozenset(names[id(p)] for p in classifier_parameters(model) if id(p) in names)
    fresh = frozenset(name for name in shapes if name.startswith('fc_norm.'))
    # the step counters of BatchNorm are optional: converted checkpoints lack them, and no forward pass uses them
    counters = {name for name in shapes if name.endswith('num_batches_tracked')}
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__ if cls.__module__.startswith('timm.'))
    filter_fn = next((m.checkpoint_filter_fn for m in modules if hasattr(m, 'checkpoint_filter_fn')), None)
    first_conv = (getattr(model, 'pretrained_cfg', None) or {}).get('first_conv') or ()
    return Target(
        state,
        shapes,
        {name: tensor.dtype for name, tensor in state.items()},
        frozenset(shapes) - classifier - fresh - counters,
        classifier,
        fresh,
        filter_fn,
        (first_conv,) if isinstance(first_conv, str) else tuple(first_conv),
        model,
    )
