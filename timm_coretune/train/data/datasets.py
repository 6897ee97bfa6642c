"""The two splits of a run, with the same classes"""

import logging
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, cast

from torch.utils.data import Dataset

from ...checks import shorten
from ..cli.settings import DataSettings
from .classes import (
    ModelClasses,
    are_placeholders,
    check_labels,
    follow_model,
    names_by_index,
    names_of_labels,
)
from .labelled import LabelledSubset, class_to_idx_of, get_labels, map_labels, read_labels
from .multi_label import no_classes_of, number_label_sets
from .opening import find_splits
from .readable import find_readable
from .shares import hold_out, take_fraction
from .splits import check_apart

_logger = logging.getLogger(__name__)


class Datasets(NamedTuple):
    """The two splits of a run.

    Attributes:
        train: Labelled training images, None if nothing is trained.
        validation: Labelled validation images, None without a validation split.
        num_classes: Number of classes, None if the data set cannot tell.
        class_names: Names of the classes by index, None if the data set cannot tell.
        validated_on: Name of the validation split, or that images are held out. None if it is the one asked for.
    """

    train: Optional[Dataset]
    validation: Optional[Dataset]
    num_classes: Optional[int]
    class_names: Optional[List[str]]
    validated_on: Optional[str] = None


def _leave_out_unreadable(dataset: Dataset, settings: DataSettings, is_training: bool) -> Dataset:
    readable = find_readable(dataset, settings, is_training)
    return dataset if readable is None else LabelledSubset(dataset, readable)


def _common_classes(known: Sequence[Dataset], settings: DataSettings) -> Optional[Dict[Any, int]]:
    """Class indices by name, the same in all splits, None if the data set has no names."""
    found = [classes for classes in map(class_to_idx_of, known) if classes]
    if not found:
        return None
    if all(are_placeholders(list(classes)) for classes in found):
        return max(found, key=len)
    for classes in found[1:]:
        if classes != found[0]:
            difference = sorted(set(found[0]) ^ set(classes), key=str)
            raise ValueError(
                f'Expected the same classes in {settings.train_split} and {settings.val_split} of '
                f'{settings.data_dir!r}, these are in one only: {", ".join(map(str, difference[:5]))}. Check the '
                'folders, or --train-split and --val-split.'
            )
    return found[0]


def _check_stream(dataset: Any, where: str) -> None:
    """Raise a ValueError if the labels of a stream are strings, whose classes are known at its end only."""
    reader: Any = getattr(dataset, 'reader', None)
    open_stream = getattr(getattr(reader, 'builder', None), 'as_streaming_dataset', None)
    if open_stream is None or reader.class_to_idx:
        return
    first = next(iter(open_stream(split=reader.split)))
    if isinstance(first.get(reader.target_key), str):
        raise ValueError(
            f'Expected class indices as labels of the stream {where}, they are strings. Give the classes as '
            '--class-map, or read the data as hfds/.'
        )


def create_datasets(
    settings: DataSettings,
    with_training: bool = True,
    seed: int = 42,
    model_classes: Optional[ModelClasses] = None,
    num_classes: Optional[int] = None,
) -> Datasets:
    """Open the training split and the validation split, with the same classes.

    Args:
        settings: Where the images are and how they are read.
        with_training: Whether to open the training split.
        seed: Seed for choosing the images of --label-fraction, and for shuffling streams.
        model_classes: The classes of the model that is evaluated, or that training starts from.
        num_classes: Number of classes that was asked for. It counts only where images have several labels.

    Raises:
        ValueError: The data does not exist, holds no images, a split is not there, the splits have different classes or
            the same images, a label is no class, or the classes are not those of the model.
    """
    where = settings.dataset or settings.data_dir or ''
    splits, open_split = find_splits(settings, with_training, seed)
    if with_training and splits.train == splits.validation:
        raise ValueError(
            f'Expected two splits of {where}, the split {splits.train!r} would be trained and validated on. Change '
            "--val-split; '' validates nothing."
        )
    train = open_split(splits.train, with_training) if with_training or splits.held_out else None
    validation = None if splits.validation is None else open_split(splits.validation, False)
    if train is not None and splits.held_out:
        classes = no_classes_of(train) if settings.is_multi_label else read_labels(train)
        what = f'{where} ({splits.train})' if splits.train else where
        train, validation = hold_out(train, splits.held_out, what, classes)
    if not with_training:
        train = None
    if train is not None and validation is not None:
        check_apart(train, validation)
    names: Optional[List[str]]
    if settings.is_multi_label:
        num_classes, names = number_label_sets(train, validation, settings, model_classes, where, num_classes)
    else:
        num_classes, names = _number_classes(train, validation, settings, model_classes, where)
    train = None if train is None else _leave_out_unreadable(train, settings, True)
    validation = None if validation is None else _leave_out_unreadable(validation, settings, False)
    if train is not None and settings.label_fraction < 1:
        classes = no_classes_of(train) if settings.is_multi_label else get_labels(train)
        train = take_fraction(train, classes, settings.label_fraction, seed)
    validated_on = None if splits.validated_on == settings.val_split else splits.validated_on
    return Datasets(train, validation, num_classes, names, validated_on)


def _number_classes(
    train: Optional[Dataset],
    validation: Optional[Dataset],
    settings: DataSettings,
    model: Optional[ModelClasses],
    where: str,
) -> Tuple[Optional[int], Optional[List[str]]]:
    """Number the classes alike in both splits and check all labels. Returns the number of classes and their names."""
    known = [dataset for dataset in (train, validation) if dataset is not None]
    labels = [found for found in map(read_labels, known) if found is not None]
    class_to_idx = _common_classes(known, settings)
    names = names_by_index(class_to_idx) if class_to_idx else None
    of_labels = names_of_labels(labels, where) if len(labels) == len(known) else None
    if of_labels is not None:
        names = of_labels
        if train is None and model is not None and set(names) <= set(model.names or ()):
            names = cast(List[str], model.names)  # the split need not have images of all classes
    if names is not None:
        ordered = names if model is None else follow_model(names, model, train is not None, bool(settings.class_map))
        place = {name: index for index, name in enumerate(ordered)}
        for dataset in known:
            if of_labels is not None:
                map_labels(dataset, place)
            elif ordered != names:
                map_labels(dataset, {index: place[name] for index, name in enumerate(names)})
        names = ordered
    num_classes = None if names is None else len(names)
    splits = (('training', train), ('validation', validation))
    dataset_of = {what: dataset for what, dataset in splits if dataset is not None}
    of_images = [(what, get_labels(dataset)) for what, dataset in dataset_of.items()]
    values = [label for _, part in of_images for label in part or ()]
    if num_classes is None and values and all(part is not None for _, part in of_images):
        num_classes = max(values) + 1
        if len(set(values)) < num_classes:
            _logger.warning(
                f'Labels of {where} go up to {max(values)}, so there are {num_classes} classes, of which '
                f'{len(set(values))} occur.'
            )
        if train is None and model is not None and model.num_classes:
            num_classes = model.num_classes
    for what, part in of_images:
        if part is not None and num_classes is not None:
            check_labels(part, num_classes, f'the {what} images of {where}')
        elif part is None:
            _check_stream(cast(Any, dataset_of[what]), where)
            _logger.info(f'The labels of the {what} images of {where} are not known before they are read.')
    if len(of_images) == 2 and of_images[0][1] and of_images[1][1]:
        never = sorted(set(of_images[1][1]) - set(of_images[0][1]))
        if never:
            shown = shorten([names[index] if names else str(index) for index in never])
            _logger.warning(f'Classes without training images are validated: {shown}.')
    return num_classes, names
