"""Images with several labels: the classes of a data set, and multi-hot targets of all its readers"""

import logging
import numbers
from typing import Any, List, Optional, Sequence, Tuple

import torch
from timm.data.target_transforms import MultiLabelTarget
from torch.utils.data import Dataset, IterableDataset

from ...data.safetensors_reader import ReaderSafetensors
from ..cli.settings import DataSettings
from .classes import ModelClasses, follow_model, names_by_index
from .labelled import class_to_idx_of, copy_of, innermost, read_labels

_logger = logging.getLogger(__name__)


class MultiHotTarget:
    """A target transform that makes a multi-hot row (num_classes,) float32 of the labels of an image, by timm's rules.

    Args:
        num_classes: Number of classes.
        dense: The labels are a row of num_classes values in [0, 1]. Otherwise they are a list of class indices.
        place: Index of each class of the data in the row, None if that is the same.
    """

    def __init__(self, num_classes: int, dense: bool = False, place: Optional[Sequence[int]] = None):
        self.encode = MultiLabelTarget(num_classes, dense)
        self.place = None if place is None else torch.tensor(place)

    def __call__(self, labels: Any) -> torch.Tensor:
        try:
            row = self.encode(labels)
        except (ValueError, TypeError) as e:
            said = str(e).split('\n')[0]
            fix = 'names need a --class-map' if _has_strings(labels) else 'see --target-format and --num-classes'
            raise ValueError(
                f'Expected {self.describe()} for each image, got {str(labels)[:100]}: {said.rstrip(".")}; {fix}.'
            ) from e
        return row if self.place is None else torch.zeros_like(row).index_copy_(0, self.place[: len(row)], row)

    def describe(self) -> str:
        """What labels are expected."""
        count = self.encode.num_classes
        return f'a row of {count} values in [0, 1]' if self.encode.dense else f'a list of class indices below {count}'


def _has_strings(labels: Any) -> bool:
    return isinstance(labels, str) or (isinstance(labels, (list, tuple)) and any(isinstance(x, str) for x in labels))


def _is_dense(dataset: Dataset, settings: DataSettings) -> bool:
    reader = getattr(innermost(dataset), 'reader', None)
    return settings.target_format == 'multihot' or isinstance(reader, ReaderSafetensors)


def _count_classes(labels: Sequence[Sequence[Any]], dense: bool) -> Optional[int]:
    """The number of classes that labels tell, None if they are no labels of several classes."""
    rows = [row for part in labels for row in part]
    if any(isinstance(row, (str, numbers.Number)) for row in rows):
        found = next(row for row in rows if isinstance(row, (str, numbers.Number)))
        raise ValueError(
            f'Expected a list of labels for each image with --task multilabel, got {found!r}. For one label an image '
            'leave out --task; in a data set of records choose the field by --target-key.'
        )
    if dense:
        return max((len(row) for row in rows), default=None)
    indices = [index for row in rows for index in row if isinstance(index, numbers.Integral)]
    return int(max(indices)) + 1 if indices else None


def number_label_sets(
    train: Optional[Dataset],
    validation: Optional[Dataset],
    settings: DataSettings,
    model: Optional[ModelClasses],
    where: str,
    asked: Optional[int],
) -> Tuple[int, Optional[List[str]]]:
    """Let both splits give multi-hot targets. Returns the number of classes and their names.

    Labels that are known before they are read are all checked, and those without any label counted.

    Args:
        train: The training split.
        validation: The validation split.
        settings: How labels are stored.
        model: The classes of the model that is evaluated, or that training starts from.
        where: The data, for messages.
        asked: Number of classes that was asked for.

    Raises:
        ValueError: The number of classes is not known, or labels are no lists of them.
    """
    dataset_of = {what: part for what, part in (('training', train), ('validation', validation)) if part is not None}
    stored = {what: read_labels(dataset) for what, dataset in dataset_of.items()}
    dense = any(_is_dense(dataset, settings) for dataset in dataset_of.values())
    classes = [found for found in map(class_to_idx_of, dataset_of.values()) if found]
    if any(found != classes[0] for found in classes):
        raise ValueError(f'Expected the same classes in both splits of {where}, they differ.')
    names = names_by_index(classes[0]) if classes else None
    count = _count_classes([part for part in stored.values() if part is not None], dense)
    num_classes = len(names) if names else asked or (model.num_classes if model is not None else None) or count
    if num_classes is None:
        raise ValueError(
            f'Expected --num-classes N: the labels of {where} are not known before they are read, and it has no names.'
        )
    place = None
    if names is not None and model is not None:
        ordered = follow_model(names, model, train is not None, bool(settings.class_map))
        if ordered != names:
            place, names = [ordered.index(name) for name in names], ordered
    transform = MultiHotTarget(num_classes, dense, place)
    for what, dataset in dataset_of.items():
        part = stored[what]
        if part is not None:
            _check_and_count(part, transform, f'the {what} images of {where}')
        else:
            _logger.info(f'The labels of the {what} images of {where} are not known before they are read.')
        innermost(dataset).target_transform = transform
    return num_classes, names


def _check_and_count(labels: Sequence[Any], transform: MultiHotTarget, what: str) -> None:
    sizes = []
    for index, row in enumerate(labels):
        try:
            sizes.append(int((transform(row) >= 0.5).sum()))
        except ValueError as e:
            raise ValueError(f'Image {index} of {what}: {e}') from e
    empty = sizes.count(0)
    said = f'{sum(sizes) / max(len(sizes), 1):.2f} labels an image in {what}'
    if empty:
        _logger.warning(f'{said}; {empty} of {len(sizes)} have no label at all, and are taken as such.')
    else:
        _logger.info(f'{said}.')


def count_label_sets(dataset: Dataset) -> Optional[Tuple[torch.Tensor, int]]:
    """Number of images that have each class (C,) float32 and of all, None if the data set cannot tell.

    Args:
        dataset: A data set to which `number_label_sets` gave multi-hot targets.
    """
    copied = copy_of(dataset)
    inner = innermost(copied)
    transform: MultiHotTarget = inner.target_transform
    inner.target_transform = None
    labels = read_labels(copied)
    if not labels:
        return None
    return sum((transform(row) >= 0.5).float() for row in labels), len(labels)  # type: ignore[return-value]


def no_classes_of(dataset: Dataset) -> Optional[List[int]]:
    """One class for all images, for what takes a share of each class. None for a stream."""
    return None if isinstance(dataset, IterableDataset) else [0] * len(dataset)  # type: ignore[arg-type]
