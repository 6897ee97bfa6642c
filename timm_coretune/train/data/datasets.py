"""Labelled images: timm's data sets, and parts of them"""

import os
import random
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, cast

import torch
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import VisionDataset

from ...data.safetensors_reader import ReaderSafetensors
from ...data.seeding import make_key
from ..cli.settings import DataSettings


class Datasets(NamedTuple):
    """What is trained and validated on.

    Attributes:
        train: Labelled training images.
        validation: Labelled validation images, None without a validation split.
        num_classes: Classes of the training split, None where the data set cannot tell.
        class_names: Their names by index, None where the data set cannot tell.
    """

    train: Optional[Dataset]
    validation: Optional[Dataset]
    num_classes: Optional[int]
    class_names: Optional[List[str]]


class _Convert:
    """A transform behind a conversion of the image."""

    def __init__(self, img_mode: str, transform: Optional[Callable]):
        self.img_mode = img_mode
        self.transform = transform

    def __call__(self, image: Any) -> Any:
        image = image.convert(self.img_mode)
        return image if self.transform is None else self.transform(image)


class ConvertedImages(Dataset):
    """Images of a torchvision data set in another PIL mode, as timm's own data sets hand them over.

    Args:
        dataset: A data set that applies its `transform` to PIL images.
        img_mode: PIL mode, such as RGB.
    """

    def __init__(self, dataset: Dataset, img_mode: str):
        self.dataset: Any = dataset
        self.img_mode = img_mode
        self.transform = None

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
    """Part of a data set, which takes the transform that timm's loader sets.

    Args:
        dataset: The whole.
        indices: The part.
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
    """Class of every image without reading the images, or None where the data set cannot tell."""
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
    elif hasattr(reader, 'targets'):  # of torchvision
        labels = list(reader.targets)
    elif hasattr(reader, 'samples'):  # of folders
        labels = [sample[1] for sample in reader.samples]
    else:
        return None
    labels = [label.item() if isinstance(label, torch.Tensor) else label for label in labels]
    return labels if all(isinstance(label, int) for label in labels) else None


def count_labels(dataset: Optional[Dataset]) -> Optional[List[int]]:
    """Images of each class that occurs, None where the data set cannot tell."""
    labels = None if dataset is None else get_labels(dataset)
    return None if labels is None else list(Counter(labels).values())


def _create_split(settings: DataSettings, split: str, is_training: bool, seed: int) -> Dataset:
    img_mode = get_img_mode(settings)
    root = settings.data_dir or ''
    if not settings.dataset and not os.path.exists(root):
        raise ValueError(f'Expected images in --data-dir {root!r}, which does not exist. Check the path.')
    if not settings.dataset and root.endswith('.safetensors'):
        return ImageDataset(root, reader=ReaderSafetensors(root, split), input_img_mode=img_mode)
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
    return ConvertedImages(dataset, img_mode) if isinstance(dataset, VisionDataset) else dataset


def get_img_mode(settings: DataSettings) -> str:
    """PIL mode of the images: the one asked for, else that of their channels."""
    return settings.input_img_mode or ('RGB' if settings.num_channels == 3 else 'L')


def _class_names(dataset: Dataset) -> Optional[Dict[Any, int]]:
    # timm keeps them in the reader, torchvision in the data set
    dataset = dataset.dataset if isinstance(dataset, ConvertedImages) else dataset
    reader = getattr(dataset, 'reader', dataset)
    return getattr(reader, 'class_to_idx', None) or None


def take_fraction(dataset: Dataset, labels: Optional[Sequence[int]], fraction: float, seed: int) -> Dataset:
    """The same share of every class, at least one image, in the order of the whole.

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
    """Open both splits.

    Args:
        settings: Where the images are.
        with_training: Open the training split too.
        seed: Seed of the choice of images where a fraction of them is used, and of streams.

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
    if train is not None and settings.label_fraction < 1:
        train = take_fraction(train, get_labels(train), settings.label_fraction, seed)
    names = [str(name) for name, _ in sorted(classes.items(), key=lambda item: item[1])] if classes else None
    return Datasets(train, validation, len(classes) if classes else None, names)
