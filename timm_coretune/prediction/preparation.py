"""Finds out how the data sets of loaders prepare images, and what their classes are called"""

from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform


def _layers(loader: Any) -> Iterator[Any]:
    """The data set of a loader, and those it is a part of."""
    dataset = getattr(loader, 'dataset', None)
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, 'dataset', None)


def find_class_names(*loaders: Any) -> Optional[List[str]]:
    """Names of the classes by index, from the first data set that has `classes` or `class_to_idx`. None without."""
    for dataset in (layer for loader in loaders for layer in _layers(loader)):
        reader = getattr(dataset, 'reader', dataset)  # where timm keeps the classes
        indices = getattr(reader, 'class_to_idx', None)
        if isinstance(indices, dict) and sorted(indices.values()) == list(range(len(indices))) and indices:
            return [str(name) for name in sorted(indices, key=lambda name: indices[name])]
        classes = getattr(dataset, 'classes', None)
        if isinstance(classes, (list, tuple)) and classes:
            return [str(name) for name in classes]
    return None


def find_transform(*loaders: Any) -> Optional[Callable]:
    """The transform of the first data set that has one, None without."""
    found = (getattr(layer, 'transform', None) for loader in loaders for layer in _layers(loader))
    return next((transform for transform in found if callable(transform)), None)


def describe_transform(transform: Callable, input_size: Tuple[int, ...]) -> Optional[Dict[str, Any]]:
    """Describe a transform as timm's config does, so that `timm.data.create_transform` makes the same.

    Args:
        transform: Makes a tensor of an image of PIL, by torchvision's or timm's steps.
        input_size: Shape of the tensors it makes, (C, H, W).

    Returns:
        Arguments of create_transform. None if what it makes of them differs, as for random steps, so that nothing is
        described wrongly.
    """
    parts = {type(part).__name__: part for part in getattr(transform, 'transforms', [transform])}
    config: Dict[str, Any] = dict(input_size=tuple(input_size), crop_pct=1.0, crop_mode='center')
    channels = input_size[0]
    normalize = parts.get('Normalize')
    for name, neutral in (('mean', 0.0), ('std', 1.0)):
        values = [neutral] * channels if normalize is None else torch.as_tensor(getattr(normalize, name)).tolist()
        config[name] = tuple(round(value, 6) for value in values)  # float32 has no more digits
    resize, crop = parts.get('Resize'), parts.get('CenterCrop')
    config['interpolation'] = getattr(getattr(resize, 'interpolation', None), 'value', 'bilinear')
    if resize is not None:
        size = resize.size if isinstance(resize.size, int) else list(resize.size)
        if crop is None and not isinstance(size, int) and len(size) == 2:
            config['crop_mode'] = 'squash'
        elif crop is not None:
            config['crop_pct'] = input_size[-1] / (size if isinstance(size, int) else size[0])
    sizes = [input_size[:0:-1]]  # width, height
    if resize is not None:
        sizes += [(input_size[2] + 13, input_size[1] + 2), (2 * input_size[2], 3 * input_size[1])]
    return config if _are_alike(transform, config, sizes) else None


def _are_alike(transform: Callable, config: Dict[str, Any], sizes: List[Tuple[int, ...]]) -> bool:
    """Whether a transform makes the same of images of these sizes as timm's by this description."""
    described = create_transform(**config)
    draws = np.random.default_rng(0)
    for width, height in sizes:
        pixels = draws.integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(pixels).convert('RGB' if config['input_size'][0] == 3 else 'L')
        try:
            made, expected = torch.as_tensor(transform(image)), described(image)
        except Exception:  # a transform of a user may raise anything; then it is another one
            return False
        if made.shape != expected.shape or not torch.allclose(made.float(), expected.float(), atol=1e-5):
            return False
    return True
