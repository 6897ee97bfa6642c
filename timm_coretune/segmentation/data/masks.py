"""Masks: the class index of every pixel, read from an image file"""

import os
from typing import Any, Optional, Tuple, Union

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ...checks import wrong_classes

IGNORE_INDEX = 255  # pixels with this value are neither trained on nor counted


def read_mask(
    image: Union[Image.Image, str, os.PathLike],
    name: str,
    size: Optional[Tuple[int, int]] = None,
    reduce_zero_label: bool = False,
) -> torch.Tensor:
    """Read the class indices of a mask.

    Args:
        image: The mask or its file. With a palette the class is the index in the palette, not the colour.
        name: Name of the mask in error messages.
        size: Width and height of the image that the mask belongs to. When None the size is not checked.
        reduce_zero_label: Ignore the value 0 and lower all other classes by one, as for ADE20K.

    Returns:
        Integers (H, W), uint8 unless the file has 16 or 32 bits.

    Raises:
        ValueError: The mask has colours in place of class indices, or another size than the image.
    """
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            return read_mask(opened, name, size, reduce_zero_label)
    if image.mode not in ('1', 'L', 'P', 'I') and not image.mode.startswith('I;16'):
        raise ValueError(
            f'Expected a mask with one class index a pixel in {name}, got an image of mode {image.mode}. Convert '
            'colours to indices first, and save a grey or palette PNG.'
        )
    if size is not None and image.size != size:
        raise ValueError(
            f'Expected a mask of {size[0]} x {size[1]} pixels, as its image has, got {image.size[0]} x '
            f'{image.size[1]} in {name}. Check that image and mask belong together, and resize a mask by nearest only.'
        )
    values = np.array(image)
    mask = torch.from_numpy(values.astype(np.uint8 if values.dtype.itemsize == 1 else np.int64))
    if reduce_zero_label:
        shifted = torch.where(mask == 0, IGNORE_INDEX, mask - 1)
        mask = torch.where(mask < IGNORE_INDEX, shifted, mask).to(mask.dtype)
    return mask


def check_mask(mask: torch.Tensor, num_classes: int, name: str) -> None:
    """Reject a mask with a value that is neither a class nor ignored.

    Raises:
        ValueError: There is such a value. The message has the name of the mask and the value.
    """
    low, high = (int(bound) for bound in mask.aminmax())
    if low >= 0 and high < num_classes:
        return
    wrong = wrong_classes(mask, num_classes, IGNORE_INDEX)
    if len(wrong):
        raise ValueError(
            f'Expected classes 0 to {num_classes - 1}, or {IGNORE_INDEX} for pixels to leave out, got the value '
            f'{int(wrong[0])} in {name}. Check the number of classes; with classes from 1 on and 0 to leave out, set '
            'reduce_zero_label.'
        )


def count_classes(source: Any, reduce_zero_label: bool = False) -> int:
    """Count the classes in all masks of a source: the highest class index plus one.

    Args:
        source: Images and masks of a split.
        reduce_zero_label: Ignore the value 0 and lower all other classes by one, as in `read_mask`.

    Raises:
        ValueError: All pixels of all masks are ignored.
    """
    highest = -1
    for index in tqdm(range(len(source)), desc='Count classes', disable=None, leave=False, dynamic_ncols=True):
        image, mask = source.load(index)
        image.close()  # counting needs the mask alone; PIL has usually not read the pixels of the image yet
        if mask.mode in ('L', 'P'):
            counts = mask.histogram()
            values = torch.tensor([value for value, count in enumerate(counts) if count])
            values = values - 1 if reduce_zero_label else values
            values = values[values != IGNORE_INDEX - reduce_zero_label]
        else:
            values = read_mask(mask, source.name(index), reduce_zero_label=reduce_zero_label)
            values = values[values != IGNORE_INDEX]
        highest = max(highest, int(values.max()) if len(values) else -1)
    if highest < 0:
        raise ValueError(
            f'Expected a class in at least one of {len(source)} masks, such as {source.name(0)}, all pixels are '
            f'{IGNORE_INDEX}. Check the masks.'
        )
    return highest + 1
