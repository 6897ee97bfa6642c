"""Puts Core-tuning where a timm user looks for it: timm.loss, timm.data, timm.task and the loss factory"""

import functools

import timm.data
import timm.loss
import timm.task

from .loss.core_tuning import CoreTuningLoss
from .loss.focal_supcon import FocalSupConLoss
from .mixup import HardPairMixup
from .task import CoreTuningTask

LOSS_TYPE = 'coretune'


def create_coretune_loss(
    num_features: int = 0,
    multi_label: bool = False,
    smoothing: float = 0.0,
    soft_targets: bool = False,
    **kwargs,
) -> CoreTuningLoss:
    """Create a CoreTuningLoss from the arguments of timm.loss.create_classification_loss.

    Args:
        num_features: Width of the features before the classifier, required.
        multi_label: Not supported.
        smoothing: Label smoothing factor, ignored with soft_targets as elsewhere in the factory.
        soft_targets: Targets arrive as soft distributions from Mixup/CutMix.
        **kwargs: Further arguments of CoreTuningLoss.

    Raises:
        ValueError: Labels are multi-label, num_features is missing, or an argument belongs to another loss.
    """
    if multi_label:
        raise ValueError(f"Loss type '{LOSS_TYPE}' mines pairs by class, it does not support multi-label targets.")
    if not num_features:
        raise ValueError(
            f"Loss type '{LOSS_TYPE}' requires num_features, the width before the classifier "
            '(model.head_hidden_size or model.num_features).'
        )
    try:
        return CoreTuningLoss(num_features, label_smoothing=0.0 if soft_targets else smoothing, **kwargs)
    except TypeError as e:
        raise ValueError(f"Loss type '{LOSS_TYPE}' takes the arguments of CoreTuningLoss: {e}") from e


def _with_coretune(create_classification_loss):
    @functools.wraps(create_classification_loss)
    def wrapper(loss_type=None, *args, **kwargs):
        if loss_type == LOSS_TYPE:
            return create_coretune_loss(*args, **kwargs)
        return create_classification_loss(loss_type, *args, **kwargs)

    wrapper.has_coretune = True
    return wrapper


def register() -> None:
    """Make timm know Core-tuning. Calling it again changes nothing; all other losses stay what they are."""
    timm.loss.CoreTuningLoss = CoreTuningLoss
    timm.loss.FocalSupConLoss = FocalSupConLoss
    timm.data.HardPairMixup = HardPairMixup
    timm.task.CoreTuningTask = CoreTuningTask
    factory = getattr(timm.loss, '_loss_factory', None)  # since timm 1.0.31
    if factory is None or hasattr(factory.create_classification_loss, 'has_coretune'):
        return
    create = _with_coretune(factory.create_classification_loss)
    loss_types = (*factory.LOSS_TYPES, LOSS_TYPE)
    for module in (factory, timm.loss, timm.task, timm.task.classification):
        for name, value in (('create_classification_loss', create), ('LOSS_TYPES', loss_types)):
            if hasattr(module, name):
                setattr(module, name, value)
