"""Reads JSON files, names of files and image headers that anybody may have written: each is checked before its use"""

import json
import math
import os
from io import BytesIO
from typing import Any, List, Sequence, Tuple, Type, Union

from PIL import Image

from ...data.images import is_hidden, reason_of
from ..data.pairs import IMAGE_EXTENSIONS

_KINDS = {str: 'a text', int: 'a whole number', list: 'a list', dict: 'an object', (int, float): 'a number'}
_ENDINGS = {'JPEG': '.jpg', 'PNG': '.png', 'BMP': '.bmp', 'TIFF': '.tif', 'WEBP': '.webp', 'PPM': '.ppm'}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112  # tag of EXIF
MAX_OUTLINE = 2_000_000  # pixels along a polygon; longer ones would take gigabytes to fill


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: There is no such file, or it is no JSON.
    """
    if not os.path.isfile(path):
        raise ValueError(f'Expected a JSON file {path!r}, which {"is none" if os.path.exists(path) else "is missing"}.')
    try:
        with open(path, encoding='utf-8-sig') as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f'Expected JSON in {path!r}, could not read it: {e}.') from e


def take(record: Any, key: str, kind: Union[Type, Tuple[Type, ...]], where: str) -> Any:
    """The value of a key of a JSON object, if it is there and of the expected kind.

    Raises:
        ValueError: It is not. The message names the key and the place.
    """
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f'Expected {key!r} in {where}, found none.')
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'Expected {_KINDS[kind]} as {key!r} in {where}, got {shown(value)}.')
    return value


def shown(value: Any) -> str:
    """A value from a file in a message: its first letters."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def take_points(values: Any, size: Tuple[int, int], where: str) -> List[Tuple[float, float]]:
    """Points (x, y) of a shape from a list of numbers in turn, or of pairs of numbers.

    Args:
        values: What the file has.
        size: Width and height of the image. Shapes may reach beyond it, but not by several times its size.
        where: Place of the shape in messages.

    Raises:
        ValueError: There are other values than numbers, or the shape is far out of the image.
    """
    pairs: Any = values
    if isinstance(values, list) and not any(isinstance(value, list) for value in values):
        pairs = list(zip(values[::2], values[1::2], strict=True)) if len(values) % 2 == 0 else None
    limit = 4 * max(size)
    fits = isinstance(pairs, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    for value in (value for pair in pairs for value in pair) if fits else ():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or abs(value) > limit:
            raise ValueError(
                f'Expected coordinates within an image of {size[0]} x {size[1]} pixels in {where}, got {shown(value)}.'
            )
    if not fits:
        raise ValueError(f'Expected a list of coordinates x, y in {where}, got {shown(values)}.')
    points = [(float(x), float(y)) for x, y in pairs]
    outline = sum(abs(a - c) + abs(b - d) for (a, b), (c, d) in zip(points, points[1:] + points[:1], strict=True))
    if outline > MAX_OUTLINE:
        raise ValueError(f'Expected an outline of at most {MAX_OUTLINE} pixels in {where}, got {outline:.0f}.')
    return points


def find_inside(folder: str, name: str, where: str) -> str:
    """Path of a file that an annotation names, which must lie in the folder of the images. It may be missing.

    Raises:
        ValueError: The name leads out of the folder, or names no image.
    """
    parts = name.replace('\\', '/').split('/')
    if name.startswith(('/', '\\')) or '..' in parts or ':' in parts[0] or '\0' in name:
        raise ValueError(
            f'Expected an image within {folder!r} in {where}, got the path {shown(name)}, which leads out of it. '
            'Correct the file name there.'
        )
    path = os.path.join(folder, *parts)
    if not path.lower().endswith(IMAGE_EXTENSIONS) or is_hidden(path):
        raise ValueError(
            f'Expected an image ({", ".join(IMAGE_EXTENSIONS)}) in {where}, got the file name {shown(name)}.'
        )
    return path


def sizes_of(image: Union[str, bytes], name: str) -> Tuple[str, Sequence[Tuple[int, int]]]:
    """The ending for the file of an image, and its width and height: as stored, and as a viewer shows it.

    Args:
        image: File of the image, or its bytes. Only the header is read.
        name: Name of the image in messages.

    Raises:
        ValueError: It is no image.
    """
    if isinstance(image, str) and not os.path.isfile(image):  # reading from a pipe would wait for ever
        raise ValueError(f'Expected an image in {name!r}, which is no file.')
    try:
        with Image.open(image if isinstance(image, str) else BytesIO(image)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_ORIENTATION, 1) in _TURNED
            ending = _ENDINGS.get(str(opened.format), '')
    except Exception as e:  # decoders raise errors of many kinds
        raise ValueError(f'Expected an image in {name!r}: {reason_of(e)}.') from e
    if isinstance(image, str):
        ending = os.path.splitext(image)[1].lower()
    elif not ending:
        raise ValueError(f'Expected an image of one of the kinds {", ".join(_ENDINGS)} in {name!r}.')
    return ending, ((width, height), (height, width) if turned else (width, height))


def check_size(size: Tuple[int, int], image: Union[str, bytes], name: str, where: str) -> str:
    """Check the size that an annotation says its image has, and return the ending for the file of the image.

    Raises:
        ValueError: The image is another one, so that no outline would fit.
    """
    ending, sizes = sizes_of(image, name)
    if size not in sizes:
        raise ValueError(
            f'Expected an image of {size[0]} x {size[1]} pixels, as {where} says, got {sizes[0][0]} x {sizes[0][1]} '
            f'in {name!r}. Take the images that were annotated, not resized ones.'
        )
    return ending
