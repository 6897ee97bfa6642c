"""Masks whose values are not the classes: classes by colour, or by a value out of few that occur

Each mask is mapped when it is loaded, so that everything else sees a mask of class indices.
"""

import logging
import re
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from ...data.images import upright
from .folders import Source, read_lines
from .masks import (
    IGNORE_INDEX,
    WrongMaskError,
    ask_about_255,
    find_values,
    ignored_value,
    read_mask,
    write_ranges,
)
from .palettes import compare_palettes

_logger = logging.getLogger(__name__)

BY_INDEX = 'index'  # value of --mask-colors: the indices of palettes are the classes, whatever their colours
IGNORED_NAME = 'ignore'


class MappedSource:
    """A source whose masks are mapped to class indices.

    Args:
        source: Images and masks.
        to_classes: Takes a mask and its name, and returns class indices uint8 (H, W).
        class_names: Names of the classes by index.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        source: Source,
        to_classes: Callable[[Image.Image, str], np.ndarray],
        class_names: Optional[List[str]] = None,
    ):
        self.source = source
        self.to_classes = to_classes
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        image, mask = self.source.load(index)
        return image, Image.fromarray(self.to_classes(upright(mask), self.name(index)))

    def name(self, index: int) -> str:
        return self.source.name(index)


class ColorClass(NamedTuple):
    """A colour in masks, its class, and the name of the class."""

    color: Tuple[int, int, int]
    label: int
    name: str


def read_colors(path: str) -> List[ColorClass]:
    """Read a file with a line `R G B name` or `#rrggbb name` for each class, in the order of the classes.

    Pixels of a colour whose name is `ignore` are neither trained on nor counted. Without a name a class is called by
    its index.

    Raises:
        ValueError: The file cannot be read, a line is no colour, or a colour has two classes.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f'Expected the colour of a class in each line of {path!r}: {e}') from e
    found: List[ColorClass] = []
    for line in lines:
        color, name = _parse(line, path)
        if any(color == other.color for other in found):
            raise ValueError(f'Expected each colour once in {path!r}, got {color} twice. A colour has one class.')
        number = sum(other.label != IGNORE_INDEX for other in found)
        is_ignored = name.lower() == IGNORED_NAME
        found.append(ColorClass(color, IGNORE_INDEX if is_ignored else number, name or str(number)))
    if not any(entry.label != IGNORE_INDEX for entry in found):
        raise ValueError(f'Expected a line `R G B name` for each class in {path!r}, found none.')
    return found


def _parse(line: str, path: str) -> Tuple[Tuple[int, int, int], str]:
    as_numbers = re.fullmatch(r'(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})(?:[\s,]+(.*))?', line)
    as_hex = re.fullmatch(r'#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})(?:[\s,]+(.*))?', line)
    match = as_numbers or as_hex
    red, green, blue = (int(part, 10 if as_numbers else 16) for part in match.groups()[:3]) if match else (256,) * 3
    if match is None or max(red, green, blue) > 255:
        raise ValueError(
            f'Expected lines such as `128 0 0 aeroplane` or `#800000 aeroplane` in {path!r}, values 0 to 255, got '
            f'{line!r}.'
        )
    return (red, green, blue), (match.group(4) or '').strip()


class ByColor:
    """Maps the colours of a mask to classes. The mask may be in colour, grey, or have a palette of its own.

    Args:
        colors: All colours that masks may have.
        path: File with these colours, for messages.
        flag: Name of the argument for this file, for messages.
    """

    def __init__(self, colors: Sequence[ColorClass], path: str, flag: str = '--mask-colors'):
        self.path, self.flag = path, flag
        ordered = sorted(colors, key=lambda entry: entry.color)
        self.codes = np.array([(r << 16) + (g << 8) + b for (r, g, b), _, _ in ordered])
        self.classes = np.array([entry.label for entry in ordered], np.uint8)

    def __call__(self, mask: Image.Image, name: str) -> np.ndarray:
        if mask.mode not in ('1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'PA'):
            raise WrongMaskError(f'Expected a mask of colours in {name}, got an image of mode {mask.mode}.')
        pixels = np.asarray(mask.convert('RGB'), np.int64)
        codes = (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        unknown = self.codes[places] != codes
        if unknown.any():
            first = tuple(int(value) for value in pixels[unknown][0])
            raise WrongMaskError(
                f'Expected only colours that {self.flag} {self.path!r} lists, got {first} in {unknown.sum()} of '
                f'{unknown.size} pixels of {name}. Add a line `{" ".join(map(str, first))} name`, or `... ignore`.'
            )
        return self.classes[places]


class ByValue:
    """Maps the values of a mask to 0, 1, 2, ... in their order, and the ignored ones to 255.

    Args:
        values: Values that are classes, ascending.
        ignored: Values of pixels to ignore.
    """

    def __init__(self, values: Sequence[int], ignored: Sequence[int]):
        self.values = np.array(values)
        self.ignored = list(ignored)

    def __call__(self, mask: Image.Image, name: str) -> np.ndarray:
        found = read_mask(mask, name).numpy().astype(np.int64)
        places = np.searchsorted(self.values, found).clip(max=len(self.values) - 1)
        is_ignored = np.isin(found, self.ignored)
        unknown = (self.values[places] != found) & ~is_ignored
        if unknown.any():
            raise WrongMaskError(
                f'Expected the values {write_ranges(self.values.tolist())} in {name}, got {found[unknown][0]}. It was '
                'not there when --remap-masks looked at all masks.'
            )
        return np.where(is_ignored, IGNORE_INDEX, places).astype(np.uint8)


def map_masks(
    sources: Sequence[Source],
    mask_colors: str = '',
    remap: bool = False,
    reduce_zero_label: bool = False,
    class_names: Optional[Sequence[str]] = None,
    ignore_index: int = IGNORE_INDEX,
) -> List[Source]:
    """Make sure that a value of a mask is the same class in all masks of all splits, by mapping them if asked to.

    Args:
        sources: The splits.
        mask_colors: File with the colour of each class, see `read_colors`. '' to take the values of masks, after a
            check that no index of a palette has two colours. 'index' to do so without the check.
        remap: Map the values that occur in any split to 0, 1, 2, ...
        reduce_zero_label: Whether the value 0 is ignored. With remap the sources that are returned have it ignored.
        class_names: Names of the values, one for each that occurs or one for each up to the highest. When None their
            numbers. For remap alone.
        ignore_index: Value of the pixels to ignore. The masks of a source that was mapped have 255 in its place.

    Raises:
        ValueError: A used index of a palette has two colours, the file of colours is no such file, or the masks have
            0 and 255 alone and nobody said that 255 is to be ignored.
    """
    if mask_colors and mask_colors != BY_INDEX:
        colors = read_colors(mask_colors)
        names = [entry.name for entry in colors if entry.label != IGNORE_INDEX]
        return [MappedSource(source, ByColor(colors, mask_colors), names) for source in sources]
    if not mask_colors:
        compare_palettes(sources, reduce_zero_label, ignore_index)
        ask_about_255(sources, ignore_index)
    if not remap:
        return list(sources)
    ignored = [*([0] if reduce_zero_label else []), ignored_value(sources[0], ignore_index)]
    values = sorted({value for source in sources for value in find_values(source)} - set(ignored))
    if not 1 <= len(values) <= IGNORE_INDEX:
        raise ValueError(
            f'Expected 1 to {IGNORE_INDEX} different values in the masks for --remap-masks, got {len(values)}. Check '
            f'the masks, such as {sources[0].name(0)}.'
        )
    known = list(class_names or sources[0].class_names or [])
    if len(known) != len(values):  # then there may be one for each value up to the highest
        known = [known[value] if value < len(known) else str(value) for value in values]
    pairs = [f'{value} -> {index} ({known[index]})' for index, value in enumerate(values)]
    _logger.info(f'Values of the masks and their classes: {", ".join(pairs)}')
    return [MappedSource(source, ByValue(values, ignored), known) for source in sources]
