"""Add Core-tuning to timm.loss, timm.data, timm.task and timm's loss factory"""

import functools
import inspect
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

import timm.data
import timm.loss
import timm.task
import torch.nn as nn
from timm.loss import _loss_factory as factory

from .loss import LOSSES, CoreTuningLoss, FocalSupConLoss, TaskLoss
from .loss.base import arguments_of
from .mixup import HardPairMixup
from .task import CoreTuningTask


def create_task_loss(
    loss_type: str,
    num_features: Union[int, nn.Module] = 0,
    multi_label: bool = False,
    smoothing: float = 0.0,
    soft_targets: bool = False,
    **kwargs: Any,
) -> TaskLoss:
    """Create a loss of this package from the arguments of timm.loss.create_classification_loss.

    Args:
        loss_type: Name of the loss in timm_coretune.loss.LOSSES.
        num_features: Width of the features before the classifier, or the model; required.
        multi_label: Whether an image may have several labels. Losses that compare images by their one class refuse it.
        smoothing: Label smoothing factor. With soft_targets it is ignored, as in timm's other losses.
        soft_targets: Whether targets are soft labels, from timm's Mixup or CutMix.
        **kwargs: Further arguments of the loss. Those of timm's other losses may only have their defaults, as in code
            that passes all of them to the factory.

    Raises:
        ValueError: The loss knows no multi-label targets, num_features is missing, or an argument is of another loss.
    """
    loss: Any = LOSSES[loss_type]
    kwargs, foreign = _split_arguments(loss, kwargs)
    if foreign:
        raise ValueError(
            f"Loss type '{loss_type}' takes the arguments of {loss.__name__}: {', '.join(foreign)} belong(s) to other "
            'losses of timm and would have no effect. Leave out what is not at its default.'
        )
    if not isinstance(num_features, nn.Module) and not num_features:
        raise ValueError(
            f"Loss type '{loss_type}' requires num_features, the width before the classifier "
            '(model.head_hidden_size or model.num_features), or the model itself.'
        )
    try:
        smoothing = 0.0 if soft_targets else smoothing
        return loss(num_features, label_smoothing=smoothing, multi_label=multi_label, **kwargs)
    except TypeError as e:
        raise ValueError(f"Loss type '{loss_type}' takes the arguments of {loss.__name__}: {e}") from e


def _split_arguments(loss: Type[TaskLoss], arguments: Dict[str, Any]) -> Tuple[Dict[str, Any], List[str]]:
    """The arguments for a loss, and those of timm's other losses that do not have their defaults, as name=value."""
    of_loss = arguments_of(loss)
    of_timm = inspect.signature(factory.create_classification_loss).parameters
    own = {name: value for name, value in arguments.items() if name in of_loss or name not in of_timm}
    others = {name: value for name, value in arguments.items() if name not in own}
    return own, [f'{name}={value!r}' for name, value in others.items() if not _is(value, of_timm[name].default)]


def _is(value: Any, default: Any) -> bool:
    """Whether an argument is its default, which is a plain value. Tensors and lists are none."""
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)


def _with_task_losses(create_classification_loss: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap timm's factory function so that it knows the losses of this package too."""

    @functools.wraps(create_classification_loss)
    def wrapper(loss_type: Optional[str] = None, *args: Any, **kwargs: Any) -> nn.Module:
        if loss_type in LOSSES:
            return create_task_loss(loss_type, *args, **kwargs)
        return create_classification_loss(loss_type, *args, **kwargs)

    return wrapper


def register() -> None:
    """Add the classes of Core-tuning to timm, and the losses of this package to its loss factory.

    All other losses of timm stay as they are. A second call changes nothing.
    """
    for place, added in (
        (timm.loss, CoreTuningLoss),
        (timm.loss, FocalSupConLoss),
        (timm.data, HardPairMixup),
        (timm.task, CoreTuningTask),
    ):
        setattr(place, added.__name__, added)
    if set(LOSSES) <= set(factory.LOSS_TYPES):
        return
    create = _with_task_losses(factory.create_classification_loss)
    loss_types = (*factory.LOSS_TYPES, *LOSSES)
    for module in (factory, timm.loss, timm.task, timm.task.classification):
        for name, value in (('create_classification_loss', create), ('LOSS_TYPES', loss_types)):
            if hasattr(module, name):
                setattr(module, name, value)
