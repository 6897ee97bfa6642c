"""Masks: the class index of every pixel, read from an image file"""

import logging
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ...checks import wrong_classes
from ...data.images import open_file, reason_of

_logger = logging.getLogger(__name__)

IGNORE_INDEX = 255  # pixels with this value are neither trained on nor counted


class WrongMaskError(ValueError):
    """A mask was read, but is not what it should be. The message names it."""


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
        with open_file(image) as opened:
            return read_mask(opened, name, size, reduce_zero_label)
    if image.mode not in ('1', 'L', 'P', 'I') and not image.mode.startswith('I;16'):
        raise WrongMaskError(
            f'Expected a mask with one class index a pixel in {name}, got an image of mode {image.mode}. Convert '
            'colours to indices first, and save a grey or palette PNG; or list the colours with --mask-colors FILE.'
        )
    if size is not None and image.size != size:
        raise WrongMaskError(
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


def load_mask(source: Any, index: int) -> Image.Image:
    """Open a mask of a source without its image."""
    if hasattr(source, 'load_mask'):
        return source.load_mask(index)
    image, mask = source.load(index)
    image.close()  # PIL has usually not read its pixels yet
    return mask


def find_values(source: Any) -> Dict[int, str]:
    """Find the values that occur in the masks of a source, each with the name of a mask that has it.

    Args:
        source: Images and masks of a split.
    """
    found: Dict[int, str] = {}
    for index in tqdm(range(len(source)), desc='Count classes', disable=None, leave=False, dynamic_ncols=True):
        name = source.name(index)
        try:
            with load_mask(source, index) as mask:
                if mask.mode in ('L', 'P'):
                    values = [value for value, count in enumerate(mask.histogram()) if count]
                else:
                    values = read_mask(mask, name).unique().tolist()
        except WrongMaskError:
            raise
        except Exception as e:  # decoders raise errors of many kinds
            raise ValueError(f'Expected a mask that can be read in {name}: {reason_of(e)}.') from e
        for value in values:
            found.setdefault(value, name)
    return found


def count_classes(source: Any, reduce_zero_label: bool = False) -> int:
    """Count the classes in all masks of a source: the highest class index plus one. Log which values occur.

    Args:
        source: Images and masks of a split.
        reduce_zero_label: Ignore the value 0 and lower all other classes by one, as in `read_mask`.

    Raises:
        ValueError: All pixels of all masks are ignored.
    """
    ignored = {0, IGNORE_INDEX} if reduce_zero_label else {IGNORE_INDEX}
    values = sorted(find_values(source).keys() - ignored)
    if not values:
        raise ValueError(
            f'Expected a class in at least one of {len(source)} masks, such as {source.name(0)}, all pixels are '
            f'{IGNORE_INDEX}{" or 0" if reduce_zero_label else ""}. Check the masks.'
        )
    num_classes = values[-1] + 1 - reduce_zero_label
    _logger.info(f'Values in the masks: {write_ranges(values)}')
    if len(values) < num_classes:
        _logger.warning(
            f'The masks have {len(values)} different values, {write_ranges(values)}, for which {num_classes} classes '
            'are built: those between have no pixel. --remap-masks numbers the values that occur from 0 on; '
            '--num-classes or a classes.txt says that all of these classes are meant.'
        )
    return num_classes


def write_ranges(values: Sequence[int]) -> str:
    """Write ascending numbers briefly, such as 0-3, 7."""
    parts: List[List[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], value]
        else:
            parts.append([value])
    return ', '.join('-'.join(map(str, part)) for part in parts)
