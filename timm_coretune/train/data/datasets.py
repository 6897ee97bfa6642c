"""Opens data sets of labelled images through timm, whole or in part"""

import functools
import os
import random
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, cast

import torch
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import VisionDataset

from ...data.images import ImageStream, LabelledImages, convert, open_image, upright
from ...data.safetensors_reader import ReaderSafetensors
from ...data.seeding import make_key
from ..cli.settings import DataSettings
from .readable import find_readable


class Datasets(NamedTuple):
    """The two splits of a run.

    Attributes:
        train: Labelled training images, None if nothing is trained.
        validation: Labelled validation images, None without a validation split.
        num_classes: Number of classes, None if the data set cannot tell.
        class_names: Names of the classes by index, None if the data set cannot tell.
    """

    train: Optional[Dataset]
    validation: Optional[Dataset]
    num_classes: Optional[int]
    class_names: Optional[List[str]]


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
    if isinstance(dataset, LabelledSubset):
        whole = get_labels(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConvertedImages):
        return get_labels(dataset.dataset)
    if getattr(dataset, 'target_transform', None) is not None or isinstance(dataset, IterableDataset):
        return None
    reader: Any = getattr(dataset, 'reader', dataset)
    labels: List[Any]
    if isinstance(reader, ReaderSafetensors):
        return reader.label.tolist()
    if hasattr(reader, 'iter_targets'):
        labels = list(reader.iter_targets())
    elif hasattr(reader, 'targets'):  # a torchvision data set
        labels = list(reader.targets)
    elif hasattr(reader, 'samples'):  # a data set of folders
        labels = [sample[1] for sample in reader.samples]
    else:
        return None
    labels = [label.item() if isinstance(label, torch.Tensor) else label for label in labels]
    return labels if all(isinstance(label, int) for label in labels) else None


def count_labels(dataset: Optional[Dataset]) -> Optional[List[int]]:
    """Number of images of each class that occurs, None if the data set cannot tell."""
    labels = None if dataset is None else get_labels(dataset)
    return None if labels is None else list(Counter(labels).values())


def _create_split(settings: DataSettings, split: str, is_training: bool, seed: int) -> Dataset:
    img_mode = get_img_mode(settings)
    root = settings.data_dir or ''
    if not settings.dataset and not os.path.exists(root):
        raise ValueError(f'Expected images in --data-dir {root!r}, which does not exist. Check the path.')
    if not settings.dataset and root.endswith('.safetensors'):
        return LabelledImages(root, reader=ReaderSafetensors(root, split), input_img_mode=img_mode)
    try:
        dataset = cast(Any, create_dataset)(
            settings.dataset,
            root=settings.data_dir,
            split=split,
            is_training=is_training,
            class_map=settings.class_map,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            seed=seed,
            repeats=settings.epoch_repeats if is_training else 0,
            input_img_mode=img_mode,
            input_key=settings.input_key,
            target_key=settings.target_key,
            num_samples=settings.train_num_samples if is_training else settings.val_num_samples,
            trust_remote_code=settings.dataset_trust_remote_code,
        )
    except (RuntimeError, FileNotFoundError) as e:
        raise ValueError(
            f'Expected images of the {split} split in --data-dir {root!r}: {e} Images lie in one folder a '
            f'class, in a folder {split}/ where there are several splits.'
        ) from e
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


def get_img_mode(settings: DataSettings) -> str:
    """PIL mode of the images: --input-img-mode if given, else RGB for three channels, else L."""
    return settings.input_img_mode or ('RGB' if settings.num_channels == 3 else 'L')


def _class_names(dataset: Dataset) -> Optional[Dict[Any, int]]:
    # timm keeps them in the reader, torchvision in the data set
    dataset = dataset.dataset if isinstance(dataset, ConvertedImages) else dataset
    reader = getattr(dataset, 'reader', dataset)
    return getattr(reader, 'class_to_idx', None) or None


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
    members: Dict[int, List[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen: List[int] = []
    for label, indices in sorted(members.items()):
        draws = random.Random(make_key(seed, label))
        chosen += draws.sample(indices, max(1, round(fraction * len(indices))))
    return LabelledSubset(dataset, sorted(chosen))


def create_datasets(settings: DataSettings, with_training: bool = True, seed: int = 42) -> Datasets:
    """Open the training split and the validation split.

    Args:
        settings: Where the images are and how they are read.
        with_training: Whether to open the training split.
        seed: Seed for choosing the images of --label-fraction, and for shuffling streams.

    Raises:
        ValueError: The data does not exist, holds no images, or the splits have different classes.
    """
    train = _create_split(settings, settings.train_split, True, seed) if with_training else None
    validation = _create_split(settings, settings.val_split, False, seed) if settings.val_split else None
    known = validation if train is None else train
    classes = None if known is None else _class_names(known)
    if train is not None and classes and validation is not None and _class_names(validation) not in (None, classes):
        difference = sorted(set(classes) ^ set(_class_names(validation) or ()), key=str)
        raise ValueError(
            f'Expected the same classes in {settings.train_split} and {settings.val_split} of {settings.data_dir!r}, '
            f'these are in one only: {", ".join(map(str, difference[:5]))}. Check the folders, or --train-split and '
            '--val-split.'
        )
    train = None if train is None else _leave_out_unreadable(train, settings, True)
    validation = None if validation is None else _leave_out_unreadable(validation, settings, False)
    if train is not None and settings.label_fraction < 1:
        train = take_fraction(train, get_labels(train), settings.label_fraction, seed)
    names = [str(name) for name, _ in sorted(classes.items(), key=lambda item: item[1])] if classes else None
    return Datasets(train, validation, len(classes) if classes else None, names)
