"""Images with labels in a safetensors file, such as the bundled sample of Fashion-MNIST

A split `train` is the two tensors `train.image` and `train.label`. The metadata of the file may have the names of the
classes under the key `class_names`, as a JSON list.
"""

import json
from typing import Dict, List, NamedTuple, Optional

import torch
from safetensors import SafetensorError, safe_open


class ImageSplit(NamedTuple):
    """The images of one split.

    Attributes:
        image: Pixels (N, H, W) of grey images or (N, H, W, 3) of colour images, uint8.
        label: Class of every image (N,), integers of any width. Or multi-hot rows (N, C) of any dtype.
        class_names: Names of the classes by index, None when the file has none.
    """

    image: torch.Tensor
    label: torch.Tensor
    class_names: Optional[List[str]]


def find_splits(path: str) -> List[str]:
    """Names of the splits in a safetensors file, sorted. A split has both images and labels.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        with safe_open(path, framework='pt') as f:
            keys = set(f.keys())
    except (OSError, SafetensorError) as e:
        raise _unreadable(path, e) from e
    stems = {key.removesuffix('.label') for key in keys if key.endswith('.label')}
    return sorted(stem for stem in stems if f'{stem}.image' in keys)


def read_split(path: str, split: str) -> ImageSplit:
    """Read the images and labels of one split.

    Args:
        path: A safetensors file.
        split: Name of the split, exactly as in the file.

    Raises:
        ValueError: The file cannot be read, has no such split, or its tensors have another dtype or shape.
    """
    splits = find_splits(path)
    if split not in splits:
        raise ValueError(
            f'Expected tensors {split}.image and {split}.label in {path!r}, which has the splits {splits}. Choose with '
            '--train-split and --val-split.'
        )
    try:
        with safe_open(path, framework='pt') as f:
            image, label = f.get_tensor(f'{split}.image'), f.get_tensor(f'{split}.label')
            class_names = _read_class_names(f.metadata() or {}, path)
    except (OSError, SafetensorError) as e:
        raise _unreadable(path, e) from e
    if image.dtype != torch.uint8 or not (image.ndim == 3 or image.ndim == 4 and image.shape[-1] == 3):
        raise ValueError(
            f'Expected {split}.image as uint8 (N, H, W) or (N, H, W, 3), got {image.dtype} {tuple(image.shape)} in '
            f'{path!r}.'
        )
    is_multi_hot = label.ndim == 2 and label.shape[1] > 0
    if (
        label.shape[:1] != image.shape[:1]
        or len(label) == 0
        or not (is_multi_hot or (label.ndim == 1 and not label.is_floating_point()))
    ):
        raise ValueError(
            f'Expected {split}.label as integers ({len(image)},), or as a multi-hot row for each image, got '
            f'{label.dtype} {tuple(label.shape)} in {path!r}.'
        )
    return ImageSplit(image, label, class_names)


def _read_class_names(metadata: Dict[str, str], path: str) -> Optional[List[str]]:
    text = metadata.get('class_names', 'null')
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = text
    if names is not None and not isinstance(names, list):
        raise ValueError(
            f'Expected class_names in the metadata of {path!r} as a JSON list of names, got {text!r}. Write it with '
            'json.dumps.'
        )
    return [str(name) for name in names] if names else None


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(f'Expected a safetensors file of images and labels, could not read {path!r}: {error}')
