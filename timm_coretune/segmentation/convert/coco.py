"""Converts COCO's JSON of instances: polygons and run-length encoded masks (RLE)"""

import os
from functools import partial
from typing import Any, Dict, List, Tuple

import numpy as np

from ..data.masks import IGNORE_INDEX
from .annotations import check_size, find_inside, read_json, shown, take, take_points
from .output import Conversion, Sample, clean_names, flat_stem

BACKGROUND = 'background'


def open_coco(
    path: str,
    images: str,
    split: str = '',
    background: bool = True,
    crowd_is_class: bool = False,
    skip_missing: bool = False,
) -> Conversion:
    """Plan the conversion of a JSON file of COCO.

    The categories become classes in the order of their ids, which may have gaps. A pixel that several instances cover
    gets the class of the smallest one, and among equals that of the last one in the file.

    Args:
        path: The JSON file.
        images: Folder of the images.
        split: Name of the split to write, '' for none.
        background: Whether pixels without an instance are class 0, called background. Otherwise they are left out.
        crowd_is_class: Whether the regions of crowds (iscrowd) are pixels of their class. Otherwise they are left out
            where no instance covers them.
        skip_missing: Leave out images that are not in the folder.

    Raises:
        ValueError: The file is no such JSON, or an image is missing or another one.
    """
    data = read_json(path)
    if isinstance(data, dict) and 'annotations' not in data:
        raise ValueError(f"Expected 'annotations' in {path!r}, found none. A file of image names has no masks.")
    classes, names = _number_categories(take(data, 'categories', list, path), background, path)
    records: Dict[int, Tuple[str, str, Tuple[int, int]]] = {}
    for number, record in enumerate(take(data, 'images', list, path)):
        where = f'image {number} of {path!r}'
        key, name = take(record, 'id', int, where), take(record, 'file_name', str, where)
        if key in records:
            raise ValueError(f'Expected each image id once in {path!r}, got {key} twice.')
        size = take(record, 'width', int, where), take(record, 'height', int, where)
        records[key] = find_inside(images, name, where), name, size
    plan = Conversion({split: []}, names, [path, images], has_instances=True)
    instances: Dict[int, List[Tuple[str, Any, int, bool]]] = {key: [] for key in records}
    for number, record in enumerate(take(data, 'annotations', list, path)):
        where = f'annotation {number} of {path!r}'
        if isinstance(record, dict) and 'segments_info' in record:
            raise ValueError(f'Expected instances in {path!r}, got panoptic annotations, whose masks are PNG files.')
        image, category = take(record, 'image_id', int, where), take(record, 'category_id', int, where)
        for key, known, kind in ((image, records, 'image'), (category, classes, 'category')):
            if key not in known:
                raise ValueError(f'Expected the id of a known {kind} in {where}, got {key}, which has no {kind}.')
        if not record.get('segmentation'):
            plan.left_out['instances without a segmentation'] += 1
            continue
        is_crowd = bool(record.get('iscrowd')) and not crowd_is_class
        instances[image].append((where, record['segmentation'], classes[category], is_crowd))
    samples = []
    for key, (file, name, size) in records.items():
        if skip_missing and not os.path.lexists(file):
            plan.left_out['images that are missing'] += 1
            plan.left_out['instances of missing images'] += len(instances[key])
            continue
        ending = check_size(size, file, name, path)
        stem = flat_stem(name)
        draw = partial(_draw, plan, f'{split}/{stem}', size, instances[key], 0 if background else IGNORE_INDEX)
        samples.append(Sample(stem, ending, file, draw))
    plan.splits[split] = samples
    plan.left_out = +plan.left_out
    return plan


def _number_categories(categories: List[Any], background: bool, path: str) -> Tuple[Dict[int, int], List[str]]:
    """Class of each category id, and the names of the classes."""
    named: Dict[int, str] = {}
    for number, record in enumerate(categories):
        where = f'category {number} of {path!r}'
        key, name = take(record, 'id', int, where), take(record, 'name', str, where)
        if key in named:
            raise ValueError(f'Expected each category id once in {path!r}, got {key} twice.')
        named[key] = name
    if not named:
        raise ValueError(f'Expected categories in {path!r}, found none.')
    ids = sorted(named)
    first = [key for key in ids if named[key].strip().lower() == BACKGROUND][:1] if background else []
    ordered = [*first, *(key for key in ids if key not in first)]
    added = int(background and not first)
    names = [BACKGROUND] * added + [named[key] for key in ordered]
    return {key: index + added for index, key in enumerate(ordered)}, clean_names(names, path)


def _draw(
    plan: Conversion,
    name: str,
    size: Tuple[int, int],
    instances: List[Tuple[str, Any, int, bool]],
    empty: int,
) -> np.ndarray:
    """Draw the mask of an image, and count its instances in the plan."""
    width, height = size
    mask = np.full((height, width), empty, np.uint8)
    owner = np.full((height, width), width * height + 1)  # area of the instance that a pixel belongs to
    crowds = np.zeros((height, width), bool)
    for where, segmentation, label, is_crowd in instances:
        covered = decode(segmentation, size, where)
        area = int(np.count_nonzero(covered))
        if not area:
            plan.left_out['instances that cover no pixel'] += 1
            continue
        plan.drawn[name] += 1
        if is_crowd:
            crowds |= covered
        else:
            chosen = covered & (owner >= area)
            mask[chosen], owner[chosen] = label, area
    mask[crowds & (owner > width * height)] = IGNORE_INDEX
    return mask


def decode(segmentation: Any, size: Tuple[int, int], where: str) -> np.ndarray:
    """Pixels that a segmentation of COCO covers, bool (H, W).

    Args:
        segmentation: Polygons, or RLE with its counts as numbers or compressed.
        size: Width and height of the image.
        where: Place of the annotation in messages.

    Raises:
        ImportError: pycocotools is not installed, and there are polygons.
        ValueError: It is no segmentation of such an image.
    """
    width, height = size
    if isinstance(segmentation, dict):
        if segmentation.get('size') != [height, width]:
            raise ValueError(
                f'Expected RLE of the size [{height}, {width}] of its image in {where}, got '
                f'{shown(segmentation.get("size"))}.'
            )
        counts: Any = segmentation.get('counts')
        if isinstance(counts, str):
            counts = read_counts(counts, where)
        whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
        if not whole or sum(counts) != width * height:
            raise ValueError(
                f'Expected RLE whose counts add up to {width * height} pixels in {where}, got {shown(counts)}.'
            )
        runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return runs.reshape(width, height).T  # the pixels run down the columns
    if not isinstance(segmentation, list):
        raise ValueError(f'Expected polygons or RLE as segmentation in {where}, got {shown(segmentation)}.')
    try:
        from pycocotools import mask as coco_mask
    except ImportError as e:
        raise ImportError(
            "Polygons of COCO are drawn by pycocotools: pip install 'timm-coretune[masks]', or pip install pycocotools"
        ) from e
    outlines = [take_points(polygon, size, where) for polygon in segmentation]
    flat = [[value for point in outline for value in point] for outline in outlines if len(outline) > 2]
    if not flat:
        return np.zeros((height, width), bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width))).astype(bool)


def read_counts(text: str, where: str) -> List[int]:
    """Counts of compressed RLE: each a number of 5 bits a letter, from the fourth on less the count two before it.

    Raises:
        ValueError: It is no such text.
    """
    counts: List[int] = []
    value, shift = 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f'Expected compressed RLE in {where}, got {shown(text)}.')
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << 1 << (shift - 5)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError(f'Expected compressed RLE in {where}, got {shown(text)}, which is cut off.')
    return counts
