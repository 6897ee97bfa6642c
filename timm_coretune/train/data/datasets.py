"""Data sets: timm's, from the arguments"""

import argparse
import os
import random
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import VisionDataset

from ..segmentation import open_splits
from .safetensors_reader import ReaderSafetensors
from .seeding import make_key


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
        self.dataset = dataset
        self.img_mode = img_mode
        self.transform = None

    @property
    def transform(self) -> Optional[Callable]:
        return self.dataset.transform.transform

    @transform.setter
    def transform(self, transform: Optional[Callable]) -> None:
        self.dataset.transform = _Convert(self.img_mode, transform)

    def __getitem__(self, index: int):
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
        self.dataset = dataset
        self.indices = indices

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform) -> None:
        self.dataset.transform = transform

    def __getitem__(self, index: int):
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)


def get_in_chans(args: argparse.Namespace) -> int:
    """Image channels: those asked for, else 3."""
    if args.in_chans is not None:
        return args.in_chans
    return args.input_size[0] if args.input_size is not None else 3


def get_labels(dataset: Dataset) -> Optional[List[int]]:
    """Class of every image without reading the images, or None where the data set cannot tell."""
    if isinstance(dataset, LabelledSubset):
        labels = get_labels(dataset.dataset)
        return None if labels is None else [labels[index] for index in dataset.indices]
    if isinstance(dataset, ConvertedImages):
        return get_labels(dataset.dataset)
    if getattr(dataset, 'target_transform', None) is not None or isinstance(dataset, IterableDataset):
        return None
    reader = getattr(dataset, 'reader', dataset)
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


def _get_img_mode(args: argparse.Namespace) -> str:
    return args.input_img_mode or ('RGB' if get_in_chans(args) == 3 else 'L')


def _create_split(args: argparse.Namespace, split: str, is_training: bool) -> Dataset:
    img_mode = _get_img_mode(args)
    if not args.dataset and not os.path.exists(args.data_dir):
        raise ValueError(f'Expected images in --data-dir {args.data_dir!r}, which does not exist. Check the path.')
    if not args.dataset and args.data_dir.endswith('.safetensors'):
        return ImageDataset(args.data_dir, reader=ReaderSafetensors(args.data_dir, split), input_img_mode=img_mode)
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            repeats=args.epoch_repeats if is_training else 0,
            input_img_mode=img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except (RuntimeError, FileNotFoundError) as e:
        raise ValueError(
            f'Expected images of the {split} split in --data-dir {args.data_dir!r}: {e} Images lie in one folder a '
            f'class, in a folder {split}/ where there are several splits.'
        ) from e
    return ConvertedImages(dataset, img_mode) if isinstance(dataset, VisionDataset) else dataset


def _class_names(dataset: Dataset) -> Optional[Dict[Any, int]]:
    # timm keeps them in the reader, torchvision in the data set
    dataset = dataset.dataset if isinstance(dataset, ConvertedImages) else dataset
    reader = getattr(dataset, 'reader', dataset)
    return getattr(reader, 'class_to_idx', None) or None


def _take_fraction(dataset: Dataset, labels: Optional[List[int]], fraction: float, seed: int) -> Dataset:
    """The same share of every class, at least one image, in the order of the whole."""
    if labels is None:
        raise ValueError(
            'Expected a data set that knows the labels of all images for --label-fraction, as folders, safetensors, '
            'torch/ and hfds/ do. A stream does not.'
        )
    members = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen = []
    for label, indices in sorted(members.items()):
        draws = random.Random(make_key(seed, label))
        chosen += draws.sample(indices, max(1, round(fraction * len(indices))))
    return LabelledSubset(dataset, sorted(chosen))


def _create_segmentation_datasets(args: argparse.Namespace) -> Datasets:
    train, validation = open_splits(args, _get_img_mode(args))
    known = validation if train is None else train
    if train is not None and args.label_fraction < 1:
        train = _take_fraction(train, [0] * len(train), args.label_fraction, args.seed)
    return Datasets(train, validation, known.num_classes, known.class_names)


def create_datasets(args: argparse.Namespace) -> Datasets:
    """Open both splits, the training split unless nothing is trained.

    Raises:
        ValueError: The data does not exist, holds no images, or the splits have different classes.
    """
    if args.segmentation:
        return _create_segmentation_datasets(args)
    train = _create_split(args, args.train_split, is_training=True) if not args.eval_only else None
    validation = _create_split(args, args.val_split, is_training=False) if args.val_split else None
    classes = _class_names(validation if train is None else train)
    if train is not None and classes and validation is not None and _class_names(validation) not in (None, classes):
        difference = sorted(set(classes) ^ set(_class_names(validation)), key=str)
        raise ValueError(
            f'Expected the same classes in {args.train_split} and {args.val_split} of {args.data_dir!r}, these are in '
            f'one only: {", ".join(map(str, difference[:5]))}. Check the folders, or --train-split and --val-split.'
        )
    if train is not None and args.label_fraction < 1:
        train = _take_fraction(train, get_labels(train), args.label_fraction, args.seed)
    names = [str(name) for name, _ in sorted(classes.items(), key=lambda item: item[1])] if classes else None
    return Datasets(train, validation, len(classes) if classes else None, names)
