"""Masks: the class index of every pixel, read from an image file"""

import logging
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageChops
from tqdm import tqdm

from ...checks import wrong_classes
from ...data.images import open_file, reason_of

_logger = logging.getLogger(__name__)

IGNORE_INDEX = 255  # pixels with this value are neither trained on nor counted, unless another one is chosen
LOSSY = ('JPEG', 'MPO', 'WEBP', 'AVIF')  # formats that may change a class index into another


class WrongMaskError(ValueError):
    """A mask was read, but is not what it should be. The message names it."""


def open_mask(path: Union[str, os.PathLike]) -> Image.Image:
    """Open the file of a mask. PIL may read its pixels later.

    Raises:
        WrongMaskError: The file has 16 bits a channel, of which PIL would drop 8 without a word.
    """
    image = open_file(path)
    tiles = getattr(image, 'tile', [])  # how a file stores its pixels
    if image.mode in ('LA', 'RGB', 'RGBA') and any('16' in str(tile[3]) for tile in tiles):
        image.close()
        raise WrongMaskError(
            f'Expected a mask with one class index a pixel in {os.fspath(path)!r}, got {image.mode} of 16 bits a '
            'channel. Save it as a grey PNG of 8 or 16 bits.'
        )
    return image


def read_mask(
    image: Union[Image.Image, str, os.PathLike],
    name: str,
    size: Optional[Tuple[int, int]] = None,
    reduce_zero_label: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Read the class indices of a mask.

    Args:
        image: The mask or its file. With a palette the class is the index in the palette, not the colour. Of colours
            with red = green = blue in all pixels the class is this value.
        name: Name of the mask in error messages.
        size: Width and height of the image that the mask belongs to. When None the size is not checked.
        reduce_zero_label: Ignore the value 0 and lower all other classes by one, as for ADE20K.
        ignore_index: Value of the pixels to ignore, which reduce_zero_label leaves as it is and sets in place of 0.

    Returns:
        Integers (H, W), uint8 unless the file has 16 or 32 bits, or ignore_index is needed and is no uint8.

    Raises:
        ValueError: The mask has colours in place of class indices, comes from a lossy file, or has another size than
            the image.
    """
    if not isinstance(image, Image.Image):
        with open_mask(image) as opened:
            return read_mask(opened, name, size, reduce_zero_label, ignore_index)
    image = _one_channel(image, name)
    if size is not None and image.size != size:
        raise WrongMaskError(
            f'Expected a mask of {size[0]} x {size[1]} pixels, as its image has, got {image.size[0]} x '
            f'{image.size[1]} in {name}. Check that image and mask belong together, and resize a mask by nearest only.'
        )
    values = np.array(image)
    mask = torch.from_numpy(values.astype(np.uint8 if values.dtype.itemsize == 1 else np.int64))
    if reduce_zero_label:
        is_kept = mask.long() >= ignore_index if ignore_index >= 0 else mask.long() == ignore_index
        mask = replace(torch.where(is_kept | (mask == 0), mask, mask - 1), (mask == 0) & ~is_kept, ignore_index)
    return mask


def _one_channel(image: Image.Image, name: str) -> Image.Image:
    """The mask with one value a pixel, if it is certain that this value is a class index."""
    if image.format in LOSSY or image.info.get('compression') == 'jpeg':
        raise WrongMaskError(
            f'Expected a mask in a lossless file for {name}, got {image.format}, which may be of mode {image.mode} '
            'but changes class indices, at edges most of all. Save the mask as PNG where it was drawn. One in black '
            "and white can be repaired: Image.open(file).convert('L').point(lambda value: value > 127)."
        )
    if image.mode in ('1', 'L', 'P', 'I') or image.mode.startswith('I;16'):
        return image
    reason = ''
    if image.mode in ('LA', 'RGB', 'RGBA'):
        channels = image.split()
        colors = channels[:-1] if image.mode.endswith('A') else channels
        is_grey = all(ImageChops.difference(colors[0], other).getbbox() is None for other in colors[1:])
        is_opaque = len(colors) == len(channels) or channels[-1].getextrema() == (255, 255)
        if is_grey and is_opaque and 'transparency' not in image.info:
            return colors[0]
        reason = ' It is transparent in some pixels.' if is_grey else ' Its red, green and blue differ.'
    raise WrongMaskError(
        f'Expected a mask with one class index a pixel in {name}, got an image of mode {image.mode}. Convert '
        'colours to indices first, and save a grey or palette PNG; or list the colours with --mask-colors FILE.'
        f'{reason}'
    )


def replace(mask: torch.Tensor, where: torch.Tensor, value: int) -> torch.Tensor:
    """Put a value into some pixels of a mask, of a wider dtype if that of the mask cannot hold it."""
    if mask.dtype == torch.uint8 and not 0 <= value <= 255:
        mask = mask.long()
    return mask.masked_fill(where, value)


def ignored_value(source: Any, ignore_index: int = IGNORE_INDEX) -> int:
    """Value of the pixels to ignore in the masks of a source: its own if it marks them itself, else the chosen one."""
    return int(getattr(source, 'ignore_index', ignore_index))


def check_mask(mask: torch.Tensor, num_classes: int, name: str, ignore_index: int = IGNORE_INDEX) -> None:
    """Reject a mask with a value that is neither a class nor ignored.

    Raises:
        ValueError: There is such a value. The message has the name of the mask and the value.
    """
    low, high = (int(bound) for bound in mask.aminmax())
    if low >= 0 and high < num_classes:
        return
    wrong = wrong_classes(mask.long(), num_classes, ignore_index)
    if len(wrong):
        raise ValueError(
            f'Expected classes 0 to {num_classes - 1}, or {ignore_index} for pixels to leave out, got the value '
            f'{int(wrong[0])} in {name}. Check the number of classes; with classes from 1 on and 0 to leave out, set '
            'reduce_zero_label; with another value of pixels to leave out, ignore_index.'
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
        for value in _values_of(source, index):
            found.setdefault(value, source.name(index))
    return found


def _values_of(source: Any, index: int) -> List[int]:
    """The values that occur in a mask."""
    name = source.name(index)
    try:
        with load_mask(source, index) as mask:
            if mask.mode in ('L', 'P') and mask.format not in LOSSY:
                return [value for value, count in enumerate(mask.histogram()) if count]
            return read_mask(mask, name).unique().tolist()
    except WrongMaskError:
        raise
    except Exception as e:  # decoders raise errors of many kinds
        raise ValueError(f'Expected a mask that can be read in {name}: {reason_of(e)}.') from e


def ask_about_255(sources: Sequence[Any], ignore_index: int = IGNORE_INDEX) -> None:
    """Refuse masks of the values 0 and 255 alone, if 255 is ignored: it is most likely the foreground.

    Masks are read up to the first that has another value, which is mostly the first one.

    Args:
        sources: The splits.
        ignore_index: Value of the pixels to ignore.

    Raises:
        ValueError: Both values occur, and no other. The message asks what 255 means.
    """
    seen: Dict[int, str] = {}
    for source in sources:
        if hasattr(source, 'ignore_index') or ignore_index != IGNORE_INDEX:
            return
        for index in range(len(source)):
            try:
                values = _values_of(source, index)
            except ValueError:
                return  # the data set refuses the mask with its name
            seen.update((value, source.name(index)) for value in values)
            if not seen.keys() <= {0, IGNORE_INDEX}:
                return
    if seen.keys() == {0, IGNORE_INDEX}:
        raise ValueError(
            f'Expected at least two classes in the masks, got the values 0 and 255 alone, such as in '
            f'{seen[IGNORE_INDEX]}, where 255 marks pixels to leave out. Is 255 your foreground? Then give '
            '--remap-masks --ignore-index -100, which makes 0 and 255 the classes 0 and 1 and leaves out none; or save '
            'the masks with 1 in place of 255. If 255 is to be left out, say so with --mask-colors index.'
        )


def count_classes(source: Any, reduce_zero_label: bool = False, ignore_index: int = IGNORE_INDEX) -> int:
    """Count the classes in all masks of a source: the highest class index plus one. Log which values occur.

    Args:
        source: Images and masks of a split.
        reduce_zero_label: Ignore the value 0 and lower all other classes by one, as in `read_mask`.
        ignore_index: Value of the pixels to ignore.

    Raises:
        ValueError: All pixels of all masks are ignored.
    """
    ignored = {ignored_value(source, ignore_index)} | ({0} if reduce_zero_label else set())
    values = sorted(find_values(source).keys() - ignored)
    if not values:
        raise ValueError(
            f'Expected a class in at least one of {len(source)} masks, such as {source.name(0)}, all pixels are '
            f'{" or ".join(map(str, sorted(ignored, reverse=True)))}, which are left out. Check the masks.'
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
