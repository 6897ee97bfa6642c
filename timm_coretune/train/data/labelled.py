"""Labelled images of any data set, whole or in part, and their labels and classes without reading an image"""

import copy
import functools
import numbers
from collections import Counter
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import INaturalist

from ...data.images import LabelledImages, UnreadableImageError, convert, open_image, reason_of, upright
from ...data.safetensors_reader import ReaderSafetensors
from .classes import LabelMap


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
        try:
            return self.dataset[index]
        except Image.DecompressionBombError as e:  # of a data set that opens its images itself
            root = getattr(self.dataset, 'root', type(self.dataset).__name__)
            raise UnreadableImageError(
                f'Expected an image that can be read in {f"{root}[{index}]"!r}: {reason_of(e)}.'
            ) from e

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
    labels = read_labels(dataset)
    if labels is None or not all(isinstance(label, numbers.Integral) for label in labels):
        return None
    return [int(label) for label in labels]


def read_labels(dataset: Dataset) -> Optional[List[Any]]:
    """Label of every image, an index or what else the data set has, None if it cannot tell. Not to be changed."""
    if isinstance(dataset, LabelledSubset):
        whole = read_labels(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConvertedImages):
        return read_labels(dataset.dataset)
    if isinstance(dataset, IterableDataset):
        return None
    transform = getattr(dataset, 'target_transform', None)
    if transform is not None and not isinstance(transform, LabelMap):
        return None
    stored = _stored_labels(dataset)
    return stored if stored is None or transform is None else [transform(label) for label in stored]


def _stored_labels(dataset: Any) -> Optional[List[Any]]:
    """Label of every image as it is stored, None if the data set cannot tell. The data set keeps what was read once."""
    if not hasattr(dataset, '_labels_in_store'):
        dataset._labels_in_store = _read_stored_labels(dataset)
    return dataset._labels_in_store


def _read_stored_labels(dataset: Any) -> Optional[List[Any]]:
    reader: Any = getattr(dataset, 'reader', dataset)
    labels: List[Any]
    if isinstance(reader, ReaderSafetensors):
        return reader.label.tolist()
    if isinstance(dataset, LabelledImages) and hasattr(reader, 'iter_targets'):
        try:
            labels = list(reader.iter_targets())  # a minute for a million images
        except KeyError as e:
            raise ValueError(f'Expected all labels of {reader.split!r} in --class-map, it has no {e}.') from e
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


def count_classes(dataset: Dataset, num_classes: int) -> Optional[Tuple[torch.Tensor, int]]:
    """Number of images of each class (num_classes,) float32 and of all, None if the data set cannot tell."""
    labels = get_labels(dataset)
    return None if labels is None else (torch.tensor(labels).bincount(minlength=num_classes).float(), len(labels))


def innermost(dataset: Any) -> Any:
    """The data set of which others are parts or conversions."""
    while isinstance(dataset, (LabelledSubset, ConvertedImages)):
        dataset = dataset.dataset
    return dataset


def class_to_idx_of(dataset: Any) -> Optional[Dict[Any, int]]:
    dataset = innermost(dataset)
    reader = getattr(dataset, 'reader', dataset)  # timm keeps the classes in the reader, torchvision in the data set
    if isinstance(reader, INaturalist) and reader.target_type == ['full']:
        return {name: index for index, name in enumerate(reader.all_categories)}
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or None


def map_labels(dataset: Any, indices: Dict[Any, int]) -> None:
    """Map the labels of a data set to class indices."""
    innermost(dataset).target_transform = LabelMap(indices)


def copy_of(dataset: Dataset) -> Dataset:
    """A copy with a transform of its own. It shares the reader and the files."""
    copied: Any = copy.copy(dataset)
    if isinstance(copied, (LabelledSubset, ConvertedImages)):
        copied.dataset = copy_of(copied.dataset)
    return copied
