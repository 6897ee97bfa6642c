"""The loss on the labels, as --loss and its companions ask timm's factory for it"""

import json
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn as nn
from timm.loss import create_classification_loss, load_class_weights, resolve_class_weights
from timm.loss.class_weights import CLASS_WEIGHT_METHOD_KINDS, load_class_stats

from .errors import asked_by
from .settings import LossSettings, Settings

Weights = Union[float, torch.Tensor, None]


class ClassStats(NamedTuple):
    """How often each class occurs.

    Attributes:
        counts: Number of images that have each class (C,) float32.
        num_samples: Number of images.
        source: Where the counts are from, for messages.
        names: Names of the classes, if they are known.
    """

    counts: torch.Tensor
    num_samples: int
    source: str
    names: Optional[List[str]] = None


def needs_stats(loss: LossSettings) -> bool:
    """Whether class counts are needed: for weights by the name of a method, and for --loss db."""
    weights = (loss.loss_class_weight, loss.pos_weight)
    return 'db' in loss.label_losses or any(weight in CLASS_WEIGHT_METHOD_KINDS for weight in weights)


def read_class_stats(path: str) -> ClassStats:
    """Read the JSON file of --class-stats, as timm's class_weights.py writes it.

    Raises:
        ValueError: The file is no such file.
        OSError: It cannot be read.
    """
    with asked_by(f'--class-stats {path}'):
        counts, num_samples = cast(Tuple[torch.Tensor, int], load_class_stats(path))  # None stands for no path
        with open(path, encoding='utf-8') as f:
            names = json.load(f).get('class_names')
    return ClassStats(counts, num_samples, f'--class-stats {path}', names)


def check_class_stats(stats: ClassStats, num_classes: int, class_names: Optional[Sequence[str]]) -> None:
    """Raise a ValueError if the counts are those of other classes than the model's."""
    if len(stats.counts) != num_classes:
        raise ValueError(
            f'Expected counts of the {num_classes} classes of the model in {stats.source}, got {len(stats.counts)}.'
        )
    pairs = zip(stats.names or (), class_names or (), strict=False)
    other = next(((index, was, now) for index, (was, now) in enumerate(pairs) if was != now), None)
    if other is not None:
        raise ValueError(
            f'Expected counts of the classes of the data in {stats.source}, but its class {other[0]} is {other[1]!r} '
            f'and that of the data {other[2]!r}. Count the classes of this data.'
        )


def _resolve(value: Optional[str], kind: str, stats: Optional[ClassStats], power: float) -> Weights:
    flag = f'--loss-{kind.replace("_", "-")}'
    if value is None:
        return None
    methods = [name for name, of in CLASS_WEIGHT_METHOD_KINDS.items() if of == kind]
    if value not in CLASS_WEIGHT_METHOD_KINDS and not os.path.isfile(value):
        try:
            return load_class_weights(value)
        except ValueError as e:
            raise ValueError(
                f'{flag}: expected numbers with commas between them, a file, or {" or ".join(methods)}, got {value!r}. '
                f'{e}'
            ) from None
    with asked_by(flag):
        given = None if stats is None else (stats.counts, stats.num_samples)
        return resolve_class_weights(value, kind, given, power)


def resolve_weight(
    loss: LossSettings, kind: str, stats: Optional[ClassStats] = None, num_classes: Optional[int] = None
) -> Weights:
    """The weights of --loss-class-weight or --loss-pos-weight.

    Args:
        loss: The settings.
        kind: 'class_weight' or 'pos_weight'.
        stats: Class counts, from which weights by the name of a method are computed.
        num_classes: Number of classes of the model, to check the number of weights. None does not check it.

    Returns:
        One weight for all classes, one for each (C,) float32, or None.

    Raises:
        ValueError: They cannot be read, or are not as many as there are classes.
    """
    value = loss.loss_class_weight if kind == 'class_weight' else loss.pos_weight
    weights = _resolve(value, kind, stats, loss.loss_weight_power)
    if isinstance(weights, torch.Tensor) and num_classes is not None and len(weights) != num_classes:
        raise ValueError(
            f'--loss-{kind.replace("_", "-")}: expected a weight for each of the {num_classes} classes, or one number '
            f'for all, got {len(weights)}.'
        )
    return weights


def weight_of_each_class(loss: LossSettings, stats: Optional[ClassStats], num_classes: int) -> Optional[torch.Tensor]:
    """The weights of --loss-class-weight, one for each class (C,), or None. Arguments and errors: `resolve_weight`."""
    weight = resolve_weight(loss, 'class_weight', stats, num_classes)
    return torch.full((num_classes,), weight) if isinstance(weight, float) else weight


def label_loss(loss: LossSettings, multi_label: bool) -> str:
    """Name of the loss on the labels in timm's factory."""
    return next(iter(loss.label_losses), 'bce' if multi_label else 'ce')


def create_criterion(
    loss: LossSettings,
    soft_targets: bool = False,
    aug_splits: int = 0,
    multi_label: bool = False,
    stats: Optional[ClassStats] = None,
    num_classes: Optional[int] = None,
) -> nn.Module:
    """Create the loss on the labels by timm's factory.

    Args:
        loss: The settings.
        soft_targets: Whether targets are soft, from pixel mixup or a TaskLoss, which apply the label smoothing too.
        aug_splits: Number of AugMix splits.
        multi_label: Whether an image may have several labels.
        stats: Class counts, if `needs_stats`.
        num_classes: Number of classes of the model, to check the number of weights.

    Raises:
        ValueError: Flags do not fit each other or the classes.
    """
    loss_type = label_loss(loss, multi_label)
    kwargs: Dict[str, Any] = dict(
        loss_type=loss_type,
        multi_label=multi_label,
        smoothing=loss.smoothing,
        soft_targets=soft_targets,
        class_weight=resolve_weight(loss, 'class_weight', stats, num_classes),
        pos_weight=resolve_weight(loss, 'pos_weight', stats, num_classes),
        bce_target_thresh=loss.bce_target_thresh,
        bce_sum=loss.bce_sum,
        poly_epsilon=loss.poly_epsilon,
        poly_gamma=loss.poly_gamma,
        jsd_splits=aug_splits,
    )
    if loss_type == 'db' and stats is not None:
        kwargs.update(class_counts=stats.counts, num_samples=stats.num_samples)
    with asked_by('--loss and its companions'):
        return create_classification_loss(**kwargs)


def find_obstacle(settings: Settings) -> str:
    """Why the loss of these settings cannot be created, whatever the data. Empty if it can."""
    loss, data = settings.loss, settings.data
    # stands for counts that only the training split can tell
    stats: Optional[ClassStats] = ClassStats(torch.ones(2), 4, 'the training split') if needs_stats(loss) else None
    try:
        if loss.class_stats is not None:
            stats = read_class_stats(loss.class_stats)
        is_method = loss.task_loss is not None and not data.is_multi_label
        if (is_method and label_loss(loss, False) == 'ce') or data.segmentation:
            resolve_weight(loss, 'class_weight', stats)
            return ''
        create_criterion(loss, is_method or data.mixes_pixels, data.aug_splits, data.is_multi_label, stats)
    except (ValueError, OSError) as e:
        return str(e)
    return ''
