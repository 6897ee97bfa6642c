"""Converts the JSON files of labelme: polygons, rectangles, circles and masks of an image each"""

import base64
import binascii
import os
from functools import partial
from io import BytesIO
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageDraw

from ...data.images import is_hidden, reason_of
from ..data.folders import read_lines
from ..data.masks import IGNORE_INDEX
from .annotations import find_inside, read_json, shown, sizes_of, take, take_points
from .output import Conversion, Sample, clean_names

BACKGROUND, IGNORED = '_background_', '__ignore__'  # labels that labelme itself gives these meanings
_NO_AREA = ('point', 'points', 'line', 'linestrip')


def open_labelme(
    folder: str,
    images: str = '',
    split: str = '',
    classes: str = '',
    known: Optional[Sequence[str]] = None,
    skip_missing: bool = False,
) -> Conversion:
    """Plan the conversion of a folder of JSON files that labelme wrote.

    Later shapes cover earlier ones, as labelme itself draws them. Pixels without a shape are class 0.

    Args:
        folder: Folder of the JSON files.
        images: Folder of the images, which are found there by their own names. When '' they are in the folder of the
            JSON files. An image that is not there is taken from its JSON file, if that has it.
        split: Name of the split to write, '' for none.
        classes: File with the name of a class in each line, in their order.
        known: Names of the classes if there is no such file. When None the labels that occur, in alphabetical order.
        skip_missing: Leave out annotations whose image is missing.

    Raises:
        ValueError: A file is none of labelme, its image is missing or another one, or a label is no class.
    """
    if not os.path.isdir(folder):
        raise ValueError(f'Expected a folder of JSON files of labelme, got {folder!r}, which is none.')
    files = [name for name in sorted(os.listdir(folder)) if name.lower().endswith('.json') and not is_hidden(name)]
    if not files:
        raise ValueError(f'Expected JSON files of labelme in {folder!r}, found none.')
    plan = Conversion({split: []}, [], [folder, *([images] if images else [])], has_instances=True)
    samples: List[Sample] = []
    labels: Dict[str, int] = {}
    used: Dict[str, str] = {}
    for file in files:
        path = os.path.join(folder, file)
        record = read_json(path)
        shapes = take(record, 'shapes', list, path)
        image = _find_image(record, path, images or folder, bool(images))
        if image is None:
            if not skip_missing:
                raise ValueError(
                    f'Expected the image {shown(record["imagePath"])} of {path!r} in {images or folder!r}, found none, '
                    'and none in the JSON file. Give its folder with --images, or leave it out with --skip-missing.'
                )
            plan.left_out['images that are missing'] += 1
            plan.left_out['shapes of missing images'] += len(shapes)
            continue
        ending, sizes = sizes_of(image, path if isinstance(image, bytes) else image)
        said = record.get('imageWidth'), record.get('imageHeight')
        size = sizes[1] if said == (None, None) else said
        if size not in sizes:
            raise ValueError(
                f'Expected an image of {shown(said[0])} x {shown(said[1])} pixels, as {path!r} says, got '
                f'{sizes[0][0]} x {sizes[0][1]}. Take the images that were annotated, not resized ones.'
            )
        for number, shape in enumerate(shapes):
            used.setdefault(take(shape, 'label', str, f'shape {number} of {path!r}').strip(), path)
        stem = os.path.splitext(file)[0]
        samples.append(Sample(stem, ending, image, partial(_draw, plan, f'{split}/{stem}', size, shapes, labels, path)))
    plan.splits[split] = samples
    plan.left_out = +plan.left_out
    names = read_lines(classes) if classes else list(known or [])
    if not names:
        names = [BACKGROUND, *sorted(used.keys() - {BACKGROUND, IGNORED})]
    names = [name for name in names if name != IGNORED]
    plan.class_names = clean_names(names, classes or folder)
    labels.update({name: index for index, name in enumerate(names)})
    labels.update({BACKGROUND: 0, IGNORED: IGNORE_INDEX})
    for label, path in used.items():
        if label not in labels:
            raise ValueError(
                f'Expected labels that are classes, got {shown(label)} in {path!r}. The classes are those of '
                f'{classes or "the folder that is written to"}: add it there, or correct the label.'
            )
    return plan


def _find_image(record: Any, path: str, folder: str, by_own_name: bool) -> Optional[Union[str, bytes]]:
    """The file of an image, or its bytes in the JSON file if it is missing, or None."""
    name = take(record, 'imagePath', str, path)
    if by_own_name:
        name = name.replace('\\', '/').rpartition('/')[2]
    embedded = record.get('imageData')
    try:
        file = find_inside(folder, name, path)
    except ValueError as e:
        if embedded is None:
            raise ValueError(f'{e} With --images FOLDER images are found there by their own names.') from e
        file = ''
    if os.path.lexists(file):
        return file
    if embedded is None:
        return None
    return _decode(take(record, 'imageData', str, path), path)


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as e:
        raise ValueError(f'Expected an image in base64 in {where}, got {shown(text)}: {e}.') from e


def _draw(
    plan: Conversion,
    name: str,
    size: Tuple[int, int],
    shapes: Sequence[Any],
    labels: Dict[str, int],
    path: str,
) -> np.ndarray:
    """Draw the shapes of an image in their order, and count them in the plan."""
    canvas = Image.new('L', size, 0)
    for number, shape in enumerate(shapes):
        where = f'shape {number} of {path!r}'
        kind, label = shape.get('shape_type') or 'polygon', labels[shape['label'].strip()]
        if kind in _NO_AREA:
            plan.left_out['shapes without an area (points and lines)'] += 1
            continue
        points = take_points(take(shape, 'points', list, where), size, where)
        if kind == 'polygon' and len(points) < 3:
            plan.left_out['polygons of less than three points'] += 1
            continue
        if kind not in ('polygon', 'rectangle', 'circle', 'mask') or (kind != 'polygon' and len(points) != 2):
            raise ValueError(
                f'Expected a polygon, or a rectangle, circle or mask of two points in {where}, got {shown(kind)} of '
                f'{len(points)} points.'
            )
        _draw_shape(canvas, kind, points, label, shape, where)
        plan.drawn[name] += 1
    return np.asarray(canvas)


def _draw_shape(
    canvas: Image.Image,
    kind: str,
    points: List[Tuple[float, float]],
    label: int,
    shape: Any,
    where: str,
) -> None:
    """Draw a shape as labelme does: with its outline."""
    pen = ImageDraw.Draw(canvas)
    if kind == 'polygon':
        pen.polygon(points, fill=label, outline=label)
        return
    (x, y), (other_x, other_y) = points
    left, top, right, bottom = min(x, other_x), min(y, other_y), max(x, other_x), max(y, other_y)
    if kind == 'rectangle':
        pen.rectangle((left, top, right, bottom), fill=label, outline=label)
    elif kind == 'circle':  # its middle, and a point on it
        radius = float(np.hypot(x - other_x, y - other_y))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=label, outline=label)
    else:
        data = _decode(take(shape, 'mask', str, where), where)
        try:
            with Image.open(BytesIO(data)) as opened:
                expected = int(right) - int(left) + 1, int(bottom) - int(top) + 1
                if opened.size != expected:
                    raise ValueError(f'it has {opened.size} pixels, its corners {expected}')
                stencil = opened.convert('L').point(lambda value: 255 * (value > 0))
        except Exception as e:  # decoders raise errors of many kinds
            raise ValueError(f'Expected a mask that fits its corners in {where}: {reason_of(e)}.') from e
        canvas.paste(label, (int(left), int(top)), stencil)
