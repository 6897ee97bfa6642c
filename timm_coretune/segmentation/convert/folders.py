"""Converts data sets whose masks are image files already: Cityscapes, ADE20K, and masks in colours"""

import os
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import numpy as np
from PIL import Image

from ...data.images import upright
from ..data.folders import open_folders
from ..data.libraries import TORCHVISION_KINDS
from ..data.mapped import ByColor, read_colors
from ..data.masks import IGNORE_INDEX, open_mask, read_mask
from ..data.pairs import IMAGE_EXTENSIONS, contents_of, files_by_stem
from .annotations import check_size
from .output import Conversion, Sample, clean_names

ADE20K_SPLITS = {'training': 'train', 'validation': 'val'}
ADE20K_CLASSES = 150
_ToClasses = Callable[[Image.Image, str], np.ndarray]


def _sample(stem: str, image: str, mask: str, to_classes: _ToClasses) -> Sample:
    """An image and its mask in files, after a check that they have one size."""
    try:
        with open_mask(mask) as opened:
            size = opened.size
    except OSError as e:
        raise ValueError(f'Expected a mask in {mask!r}: {e}.') from e
    return Sample(stem, check_size(size, image, image, mask), image, partial(_load, mask, to_classes))


def _load(path: str, to_classes: _ToClasses) -> np.ndarray:
    try:
        with open_mask(path) as mask:
            return to_classes(upright(mask), path)
    except OSError as e:
        raise ValueError(f'Expected a mask that can be read in {path!r}: {e}.') from e


def _expect_folders(root: str, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if not os.path.isdir(os.path.join(root, name))]
    if missing:
        there = contents_of(root) if os.path.isdir(root) else ', as the folder does not exist'
        raise ValueError(
            f'Expected {what} in {root!r} with the folders {", ".join(names)}, found no {missing[0]}{there}.'
        )


class ByTable:
    """Maps each value of a mask to a class.

    Args:
        table: Class by value. Further values are refused.
    """

    def __init__(self, table: Sequence[int]):
        self.table = np.array(table, np.uint8)

    def __call__(self, mask: Image.Image, name: str) -> np.ndarray:
        values = read_mask(mask, name).numpy()
        if values.max() >= len(self.table) or values.min() < 0:
            wrong = values[(values >= len(self.table)) | (values < 0)][0]
            raise ValueError(f'Expected values from 0 to {len(self.table) - 1} in {name!r}, got {wrong}.')
        return self.table[values]


def open_cityscapes(root: str, skip_missing: bool = False) -> Conversion:
    """Plan the conversion of Cityscapes: the labelIds of gtFine become the 19 classes (trainIds) that are scored.

    Args:
        root: Folder with leftImg8bit/ and gtFine/. The test split is passed over, as its masks are empty.
        skip_missing: Leave out images without a mask.

    Raises:
        ValueError: The folders are not there, or an image has no mask.
    """
    _expect_folders(root, ('leftImg8bit', 'gtFine'), 'Cityscapes')
    kind = TORCHVISION_KINDS['cityscapes']
    images, masks = os.path.join(root, 'leftImg8bit'), os.path.join(root, 'gtFine')
    plan = Conversion({}, list(kind.class_names), [images, masks])
    to_classes = ByTable(kind.table or [])
    for split in ('train', 'val'):
        samples: List[Sample] = []
        for path in sorted(Path(images, split).glob('*/*_leftImg8bit.*')):
            if not path.name.lower().endswith(IMAGE_EXTENSIONS):
                continue
            stem = path.stem.removesuffix('_leftImg8bit')
            mask = os.path.join(masks, split, path.parent.name, f'{stem}_gtFine_labelIds.png')
            if os.path.isfile(mask):
                samples.append(_sample(stem, str(path), mask, to_classes))
                continue
            _leave_out(
                plan,
                skip_missing,
                f'Expected the mask {mask!r} for {str(path)!r}, which is missing. It is in gtFine_trainvaltest.zip of '
                'Cityscapes; --skip-missing leaves such images out.',
            )
        if samples:
            plan.splits[split] = samples
    if not plan.splits:
        raise ValueError(f'Expected images such as train/CITY/NAME_leftImg8bit.png in {images!r}, found none.')
    return plan


def open_ade20k(root: str, skip_missing: bool = False) -> Conversion:
    """Plan the conversion of ADE20K for scene parsing: 0 is left out, and the classes 1 to 150 become 0 to 149.

    Args:
        root: Folder with images/ and annotations/, each with training/ and validation/. The names of the classes are
            those of objectInfo150.txt if it is there, else their numbers.
        skip_missing: Leave out images without a mask.

    Raises:
        ValueError: The folders are not there, or an image has no mask.
    """
    _expect_folders(root, ('images', 'annotations'), 'ADE20K for scene parsing (ADEChallengeData2016)')
    images, masks = os.path.join(root, 'images'), os.path.join(root, 'annotations')
    plan = Conversion({}, _ade20k_names(root), [images, masks])
    to_classes = ByTable([IGNORE_INDEX, *range(ADE20K_CLASSES)])
    for folder, split in ADE20K_SPLITS.items():
        image_folder, mask_folder = (os.path.join(kind, folder) for kind in (images, masks))
        if not os.path.isdir(image_folder):
            continue
        _expect_folders(masks, (folder,), 'masks')
        found, samples = files_by_stem(mask_folder, ('.png',)), []
        for stem, path in sorted(files_by_stem(image_folder, IMAGE_EXTENSIONS).items()):
            if stem in found:
                samples.append(_sample(stem, path, found[stem], to_classes))
                continue
            _leave_out(
                plan,
                skip_missing,
                f'Expected the mask {stem}.png in {mask_folder!r} for {path!r}, which is missing; --skip-missing '
                'leaves such images out.',
            )
        if samples:
            plan.splits[split] = samples
    if not plan.splits:
        raise ValueError(f'Expected images in {images!r}/training or /validation, found none{contents_of(images)}.')
    return plan


def _leave_out(plan: Conversion, skip_missing: bool, error: str) -> None:
    """Count an image without a mask, or raise the error as a ValueError if such images are not to be left out."""
    if not skip_missing:
        raise ValueError(error)
    plan.left_out['images without a mask'] += 1


def _ade20k_names(root: str) -> List[str]:
    """Names of the classes from objectInfo150.txt, or their numbers there."""
    path = os.path.join(root, 'objectInfo150.txt')
    if not os.path.isfile(path):
        return [str(number + 1) for number in range(ADE20K_CLASSES)]
    try:
        with open(path, encoding='utf-8') as f:
            rows = [line.rstrip('\n').split('\t') for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f'Expected the names of the classes in {path!r}: {e}.') from e
    names: Dict[str, str] = {row[0].strip(): row[-1] for row in rows[1:]}
    wanted = [str(number + 1) for number in range(ADE20K_CLASSES)]
    if sorted(names) != sorted(wanted):
        raise ValueError(f'Expected a row for each of the classes 1 to {ADE20K_CLASSES} in {path!r}, got {len(names)}.')
    return clean_names([names[number] for number in wanted], path)


def open_colors(root: str, colors: str, split: str = '', to_split: str = '') -> Conversion:
    """Plan the conversion of masks in colours, or with palettes that differ, to class indices.

    Args:
        root: Folder in a layout that train.py reads.
        colors: File with a line `R G B name` for each class, see `read_colors`.
        split: Name of the split to read, '' for all images of a folder without splits.
        to_split: Name of the split to write, '' for none.

    Raises:
        ValueError: There are no such masks, or the file of colours is none.
    """
    listed = read_colors(colors)
    names = [entry.name for entry in listed if entry.label != IGNORE_INDEX]
    source = open_folders(root, split or 'train', hold_out=False)
    to_classes = ByColor(listed, colors, '--colors')
    samples = [
        _sample(os.path.splitext(os.path.basename(image))[0], image, mask, to_classes)
        for image, mask in zip(source.images, source.masks, strict=True)
    ]
    inputs = sorted({os.path.dirname(path) for path in [*source.images, *source.masks]})
    return Conversion({to_split: samples}, clean_names(names, colors), [colors, *inputs])
