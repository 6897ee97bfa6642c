"""Opens data sets of labelled images through timm, whole or in part"""

import copy
import functools
import logging
import numbers
import os
import random
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, cast
from weakref import WeakKeyDictionary

import torch
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import INaturalist, VisionDataset

from ...data.images import ImageStream, LabelledImages, convert, open_image, upright
from ...data.safetensors_images import find_splits
from ...data.safetensors_reader import ReaderSafetensors
from ...data.seeding import make_key
from ..cli.settings import DataSettings
from .class_folders import ReaderClassFolders, ReaderClassTar, TorchvisionClassFolders, in_natural_order, shorten
from .classes import (
    LabelMap,
    ModelClasses,
    are_placeholders,
    check_labels,
    follow_model,
    names_by_index,
    names_of_labels,
    read_class_map,
)
from .readable import find_readable
from .splits import (
    Splits,
    check_apart,
    choose_splits,
    splits_by_name,
    splits_of_folder,
    splits_of_hfds,
    splits_of_torchvision,
)

_logger = logging.getLogger(__name__)

_HOLD_OUT_SEED = 0  # not --seed: else runs of other seeds would validate on images that this one was trained on
_KNOWN_LABELS: 'WeakKeyDictionary[Any, List[Any]]' = WeakKeyDictionary()


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


class _Convert:
    """Turns an image upright, converts it to a PIL mode, then applies a transform."""

    def __init__(self, img_mode: str, transform: Optional[Callable]):
        self.img_mode = img_mode
        self.transform = transform

    def __call__(self, image: Any) -> Any:
        image = convert(upright(image), self.img_mode)
        return image if self.transform is None else self.transform(image)


class ConvertedImages(Dataset):
    """A torchvision data set whose images are converted to a PIL mode, as timm does in its own data sets.

    Args:
        dataset: A data set that applies its `transform` to PIL images.
        img_mode: PIL mode, such as RGB.
    """

    def __init__(self, dataset: Dataset, img_mode: str):
        self.dataset: Any = dataset
        self.img_mode = img_mode
        self.transform = None
        if hasattr(self.dataset, 'loader'):  # a data set of files, whose own loader would drop the transparency
            self.dataset.loader = functools.partial(open_image, mode=img_mode)

    @property
    def transform(self) -> Optional[Callable]:
        return self.dataset.transform.transform

    @transform.setter
    def transform(self, transform: Optional[Callable]) -> None:
        self.dataset.transform = _Convert(self.img_mode, transform)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


class LabelledSubset(Dataset):
    """Part of a data set. Its `transform`, which timm's loader sets, is that of the whole data set.

    Args:
        dataset: The whole data set.
        indices: Indices of the images that belong to the part.
    """

    def __init__(self, dataset: Dataset, indices: List[int]):
        self.dataset: Any = dataset
        self.indices = indices

    @property
    def transform(self) -> Optional[Callable]:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Optional[Callable]) -> None:
        self.dataset.transform = transform

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)


def get_labels(dataset: Dataset) -> Optional[List[int]]:
    """Class of every image, known without reading the images, or None if the data set cannot tell."""
    labels = _read_labels(dataset)
    if labels is None or not all(isinstance(label, numbers.Integral) for label in labels):
        return None
    return [int(label) for label in labels]


def _read_labels(dataset: Dataset) -> Optional[List[Any]]:
    """Label of every image, an index or what else the data set has, None if it cannot tell."""
    if isinstance(dataset, LabelledSubset):
        whole = _read_labels(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConvertedImages):
        return _read_labels(dataset.dataset)
    if isinstance(dataset, IterableDataset):
        return None
    transform = getattr(dataset, 'target_transform', None)
    if transform is not None:
        if not isinstance(transform, LabelMap):
            return None
        original: Any = copy.copy(dataset)
        original.target_transform = None
        whole = _read_labels(original)
        return None if whole is None else [transform(label) for label in whole]
    reader: Any = getattr(dataset, 'reader', dataset)
    labels: List[Any]
    if isinstance(reader, ReaderSafetensors):
        return reader.label.tolist()
    if hasattr(reader, 'iter_targets'):
        if reader not in _KNOWN_LABELS:  # reading them takes a minute for a million images
            try:
                _KNOWN_LABELS[reader] = list(reader.iter_targets())
            except KeyError as e:
                raise ValueError(f'Expected all labels of {reader.split!r} in --class-map, it has no {e}.') from e
        labels = list(_KNOWN_LABELS[reader])
    elif isinstance(dataset, INaturalist) and dataset.target_type == ['full']:
        labels = [category for category, _ in dataset.index]
    elif hasattr(reader, 'targets'):  # a torchvision data set
        labels = list(reader.targets)
    elif hasattr(reader, 'samples'):  # a data set of folders
        labels = [sample[1] for sample in reader.samples]
    else:
        return None
    return [label.item() if isinstance(label, torch.Tensor) else label for label in labels]


def count_labels(dataset: Optional[Dataset]) -> Optional[List[int]]:
    """Number of images of each class that occurs, None if the data set cannot tell."""
    labels = None if dataset is None else get_labels(dataset)
    return None if labels is None else list(Counter(labels).values())


def _create_with_timm(settings: DataSettings, root: str, split: str, is_training: bool, **options: Any) -> Dataset:
    img_mode = get_img_mode(settings)
    try:
        dataset = cast(Any, create_dataset)(
            settings.dataset,
            root=root or settings.data_dir,
            split=split,
            search_split=False,
            is_training=is_training,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            repeats=settings.epoch_repeats if is_training else 0,
            input_img_mode=img_mode,
            input_key=settings.input_key,
            target_key=settings.target_key,
            num_samples=settings.train_num_samples if is_training else settings.val_num_samples,
            trust_remote_code=settings.dataset_trust_remote_code,
            **options,
        )
    except (RuntimeError, FileNotFoundError) as e:
        raise ValueError(f'Expected images of the split {split!r} of {settings.dataset} in {root!r}: {e}') from e
    return _open_by_our_rules(dataset, img_mode)


def _open_by_our_rules(dataset: Any, img_mode: str) -> Dataset:
    """The same data set, which opens images as data/images.py does."""
    if isinstance(dataset, VisionDataset):
        return ConvertedImages(dataset, img_mode)
    if isinstance(dataset, ImageDataset):
        return LabelledImages(None, reader=dataset.reader, input_img_mode=img_mode)
    if isinstance(dataset, IterableImageDataset) and type(dataset.reader).__name__ != 'ReaderTfds':
        return ImageStream(dataset.reader, img_mode)  # TensorFlow decodes its images itself
    return dataset


def _leave_out_unreadable(dataset: Dataset, settings: DataSettings, is_training: bool) -> Dataset:
    readable = find_readable(dataset, settings, is_training)
    return dataset if readable is None else LabelledSubset(dataset, readable)


def _open_with_torchvision(root: str, img_mode: str) -> Dataset:
    try:
        return ConvertedImages(TorchvisionClassFolders(root), img_mode)
    except FileNotFoundError as e:
        raise ValueError(f'Expected images in one folder per class in {root!r}: {e}') from e


_Open = Callable[[str, bool], Dataset]  # opens the split of this name, to be trained on or not


def _find_splits(settings: DataSettings, with_training: bool, seed: int) -> Tuple[Splits, _Open]:
    """Choose the splits. Returns them with a function that opens one."""
    root, img_mode = settings.data_dir or '', get_img_mode(settings)
    kind, _, name = settings.dataset.partition('/')
    kind = kind.lower() if name else ''
    if settings.class_map and (kind == 'torch' or root.endswith('.safetensors')):
        raise ValueError('Expected --class-map with folders, a tar file or records: this data set has its own indices.')
    class_map = read_class_map(settings.class_map, root)
    if kind in ('torch', 'hfds', 'hfids', 'tfds', 'wds'):
        with_timm = functools.partial(_create_with_timm, settings, class_map=class_map, seed=seed)
        if name.lower() in ('image_folder', 'folder'):
            _check_exists(root)
            splits = splits_of_folder(root, settings, with_training)
            return splits, lambda split, _: _open_with_torchvision(os.path.join(root, split), img_mode)
        if kind in ('hfds', 'hfids'):
            splits = splits_of_hfds(settings, with_training)
        elif kind == 'torch':
            splits = splits_of_torchvision(name.lower(), settings, with_training)
        else:
            splits = splits_by_name(settings)
        return splits, functools.partial(with_timm, root)
    _check_exists(root)
    if root.endswith('.safetensors'):
        splits = choose_splits(settings, find_splits(root), root, with_training)
        return splits, lambda split, _: LabelledImages(root, ReaderSafetensors(root, split), input_img_mode=img_mode)
    if settings.target_key or settings.train_num_samples or settings.val_num_samples:
        raise ValueError('Expected --target-key, --train-num-samples and --val-num-samples with records or streams.')
    if os.path.isdir(root):
        types = settings.input_key.split(';') if settings.input_key else None
        return splits_of_folder(root, settings, with_training), lambda split, _: LabelledImages(
            root, ReaderClassFolders(os.path.join(root, split), class_map, types), input_img_mode=img_mode
        )
    if not root.endswith('.tar'):
        raise ValueError(f'Expected a folder, a .tar or a .safetensors file in --data-dir, got {root!r}.')
    reader = ReaderClassTar(root, class_map)
    tops = reader.top_folders()
    splits = choose_splits(settings, in_natural_order(list({*tops} - {''})), root, with_training, may_be_whole=True)

    def open_members(split: str, _: bool) -> Dataset:
        whole = LabelledImages(root, reader, input_img_mode=img_mode)
        return LabelledSubset(whole, [i for i, top in enumerate(tops) if top == split]) if split else whole

    return splits, open_members


def _check_exists(root: str) -> None:
    if not os.path.exists(root):
        raise ValueError(f'Expected images in --data-dir {root!r}, which does not exist. Check the path.')


def get_img_mode(settings: DataSettings) -> str:
    """PIL mode of the images: --input-img-mode if given, else RGB for three channels, else L."""
    return settings.input_img_mode or ('RGB' if settings.num_channels == 3 else 'L')


def _members(labels: Sequence[Any]) -> Dict[Any, List[int]]:
    """Indices of the images of each class."""
    members: Dict[Any, List[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return members


def take_fraction(dataset: Dataset, labels: Optional[Sequence[int]], fraction: float, seed: int) -> Dataset:
    """Take the same share of the images of each class, at least one, in their original order.

    Raises:
        ValueError: The labels are not known.
    """
    if fraction == 1:
        return dataset
    if labels is None:
        raise ValueError(
            'Expected a data set that knows the labels of all images for --label-fraction, as folders, safetensors, '
            'torch/ and hfds/ do. A stream does not.'
        )
    members = _members(labels)
    chosen: List[int] = []
    for label, indices in sorted(members.items()):
        draws = random.Random(make_key(seed, label))
        chosen += draws.sample(indices, max(1, round(fraction * len(indices))))
    return LabelledSubset(dataset, sorted(chosen))


def hold_out(dataset: Dataset, fraction: float, where: str) -> Tuple[Dataset, Dataset]:
    """Hold out images of each class for validation, the same in every run whatever its seed.

    Args:
        dataset: The images to train on.
        fraction: Share of the images of each class to hold out, at least one image. A class of one image has none.
        where: The data, for the log.

    Returns:
        The images that are left to train on, and those that are held out.

    Raises:
        ValueError: The labels are not known, or nothing can be held out.
    """
    labels = _read_labels(dataset)
    if labels is None:
        raise ValueError(
            f'Expected a validation split in {where}, from which no images can be held out, as it cannot tell the '
            "labels of all images. Name a split as --val-split, or give --val-split '' to validate nothing."
        )
    chosen: List[int] = []
    members = _members(labels)
    for _, indices in sorted(members.items(), key=lambda item: str(item[0])):
        count = min(max(1, round(fraction * len(indices))), len(indices) - (fraction < 1))
        chosen += random.Random(make_key(_HOLD_OUT_SEED, len(indices), len(chosen))).sample(indices, count)
    if not chosen:
        raise ValueError(f'Expected two images of a class in {where} to hold out one for validation, found none.')
    single = sum(len(indices) == 1 for indices in members.values())
    _logger.info(
        f'Validation on {len(chosen)} of the {len(labels)} images of {where}: {100 * fraction:g} % of each class are '
        f'held out, the same in every run (--val-fraction).'
        + (f' {single} class(es) of one image have none in the validation.' if single and fraction < 1 else '')
    )
    held = set(chosen)
    return (
        LabelledSubset(dataset, [index for index in range(len(labels)) if index not in held]),
        LabelledSubset(_copy_of(dataset), sorted(chosen)),
    )


def _copy_of(dataset: Dataset) -> Dataset:
    """A copy with a transform of its own. It shares the reader and the files."""
    copied: Any = copy.copy(dataset)
    if isinstance(copied, (LabelledSubset, ConvertedImages)):
        copied.dataset = _copy_of(copied.dataset)
    return copied


def _class_to_idx(dataset: Any) -> Optional[Dict[Any, int]]:
    while isinstance(dataset, (LabelledSubset, ConvertedImages)):
        dataset = dataset.dataset
    reader = getattr(dataset, 'reader', dataset)  # timm keeps the classes in the reader, torchvision in the data set
    if isinstance(reader, INaturalist) and reader.target_type == ['full']:
        return {name: index for index, name in enumerate(reader.all_categories)}
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or None


def _map_labels(dataset: Any, indices: Dict[Any, int]) -> None:
    """Map the labels of a data set to class indices."""
    while isinstance(dataset, (LabelledSubset, ConvertedImages)):
        dataset = dataset.dataset
    dataset.target_transform = LabelMap(indices)


def _common_classes(known: Sequence[Dataset], settings: DataSettings) -> Optional[Dict[Any, int]]:
    """Class indices by name, the same in all splits, None if the data set has no names."""
    found = [classes for classes in map(_class_to_idx, known) if classes]
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
) -> Datasets:
    """Open the training split and the validation split, with the same classes.

    Args:
        settings: Where the images are and how they are read.
        with_training: Whether to open the training split.
        seed: Seed for choosing the images of --label-fraction, and for shuffling streams.
        model_classes: The classes of the model that is evaluated, or that training starts from.

    Raises:
        ValueError: The data does not exist, holds no images, a split is not there, the splits have different classes or
            the same images, a label is no class, or the classes are not those of the model.
    """
    where = settings.dataset or settings.data_dir or ''
    splits, open_split = _find_splits(settings, with_training, seed)
    if with_training and splits.train == splits.validation:
        raise ValueError(
            f'Expected two splits of {where}, the split {splits.train!r} would be trained and validated on. Change '
            "--val-split; '' validates nothing."
        )
    train = open_split(splits.train, with_training) if with_training or splits.held_out else None
    validation = None if splits.validation is None else open_split(splits.validation, False)
    if train is not None and splits.held_out:
        train, validation = hold_out(train, splits.held_out, f'{where} ({splits.train})' if splits.train else where)
    if not with_training:
        train = None
    if train is not None and validation is not None:
        check_apart(train, validation)
    num_classes, names = _number_classes(train, validation, settings, model_classes, where)
    train = None if train is None else _leave_out_unreadable(train, settings, True)
    validation = None if validation is None else _leave_out_unreadable(validation, settings, False)
    if train is not None and settings.label_fraction < 1:
        train = take_fraction(train, get_labels(train), settings.label_fraction, seed)
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
    labels = [found for found in map(_read_labels, known) if found is not None]
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
                _map_labels(dataset, place)
            elif ordered != names:
                _map_labels(dataset, {index: place[name] for index, name in enumerate(names)})
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
