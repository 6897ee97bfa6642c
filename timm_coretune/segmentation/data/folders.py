"""Images and masks in folders: as PASCAL VOC keeps them, or as a pair of folders

What holds the images and masks of a split is a source, see `Source`. Those of libraries are in libraries.py, made ones
in sample.py.
"""

import glob
import logging
import os
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Protocol, Sequence, Tuple

from PIL import Image

from .palette import VOC_CLASSES

_logger = logging.getLogger(__name__)

TRAIN_SPLITS = ('train', 'training', 'trainval')
VALIDATION_SPLITS = ('validation', 'val', 'valid', 'eval', 'test')
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
MASK_EXTENSIONS = ('.png', '.tif', '.tiff', '.bmp', '.gif')  # none loses values, as JPEG does
HELD_OUT_EVERY = 10  # images, where there are no splits
LAYOUTS = (
    'Either as PASCAL VOC: JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt; or as two folders '
    'images/ and masks/ with files of the same stem: <split>/images and <split>/masks, images/<split> and '
    'masks/<split>, or without splits.'
)


class Source(Protocol):
    """Images and masks of a split.

    Attributes:
        class_names: Names by index, None where the source cannot tell.
    """

    class_names: Optional[List[str]]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        """Image and mask, possibly not read yet."""

    def name(self, index: int) -> str:
        """What errors call a mask: its file if it has one of its own."""


class FileSource:
    """Images and masks in files.

    Args:
        images: Files of the images.
        masks: Files of their masks.
        class_names: Names by index.
    """

    def __init__(self, images: Sequence[str], masks: Sequence[str], class_names: Optional[List[str]] = None):
        self.images = images
        self.masks = masks
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        return Image.open(self.images[index]), Image.open(self.masks[index])

    def name(self, index: int) -> str:
        return self.masks[index]


def resolve_split(split: str, available: Iterable[str], where: str) -> str:
    """Name under which a split exists, as validation sets are called val or test elsewhere.

    Args:
        split: Asked for.
        available: Splits that there are.
        where: What has them, for messages.

    Raises:
        ValueError: No split has this name or one of its synonyms.
    """
    available = list(available)
    if split in available:
        return split
    for synonyms in (TRAIN_SPLITS, VALIDATION_SPLITS):
        found = [name for name in synonyms if name in available]
        if split in synonyms and found:
            _logger.info(f'Split {found[0]} of {where} serves as {split}')
            return found[0]
    raise ValueError(
        f'Expected a split {split!r} in {where}, which has {sorted(available)}. Choose one of these, or check the path.'
    )


def open_folders(root: str, split: str, hold_out: bool = True) -> FileSource:
    """Images and masks of a split in folders.

    Args:
        root: Folder with one of the layouts, that of VOC also in VOCdevkit/VOC20xx or VOC20xx.
        split: Name of the split, or a synonym.
        hold_out: Where nothing tells the splits apart, keep every tenth image for validation. Otherwise all images
            are in any split.

    Raises:
        ValueError: There is no such layout or split, or an image lacks its mask.
    """
    candidates = [root]
    for pattern in ('VOCdevkit/VOC20??', 'VOC20??'):
        candidates += sorted(glob.glob(os.path.join(glob.escape(root), pattern)), reverse=True)
    for folder in candidates:
        if os.path.isdir(os.path.join(folder, 'ImageSets', 'Segmentation')):
            return _open_voc(folder, split)
    if os.path.isdir(os.path.join(root, 'images')) and os.path.isdir(os.path.join(root, 'masks')):
        return _open_pair(root, split, hold_out)
    splits = {
        entry.name
        for entry in (os.scandir(root) if os.path.isdir(root) else ())
        if all(os.path.isdir(os.path.join(entry.path, kind)) for kind in ('images', 'masks'))
    }
    if not splits:
        problem = 'found neither' if os.path.isdir(root) else 'which does not exist'
        raise ValueError(f'Expected images and masks in {root!r}, {problem}. {LAYOUTS} Check the path.')
    folder = os.path.join(root, resolve_split(split, splits, root))
    return _pair(os.path.join(folder, 'images'), os.path.join(folder, 'masks'))


def read_lines(path: str) -> List[str]:
    """Lines of a text file that are not empty."""
    with open(path, encoding='utf-8') as f:
        return [line.strip() for line in f if line.strip()]


def _open_voc(folder: str, split: str) -> FileSource:
    lists = {path.stem: str(path) for path in Path(folder, 'ImageSets', 'Segmentation').glob('*.txt')}
    listed = lists[resolve_split(split, lists, folder)]
    images, masks = os.path.join(folder, 'JPEGImages'), os.path.join(folder, 'SegmentationClass')
    return _pair(images, masks, listed, list(VOC_CLASSES))


def _open_pair(root: str, split: str, hold_out: bool) -> FileSource:
    images, masks = os.path.join(root, 'images'), os.path.join(root, 'masks')
    splits = {entry.name for entry in os.scandir(images) if os.path.isdir(os.path.join(masks, entry.name))}
    if splits:
        found = resolve_split(split, splits, root)
        return _pair(os.path.join(images, found), os.path.join(masks, found))
    lists = {path.stem: str(path) for path in Path(root).glob('*.txt') if path.stem in TRAIN_SPLITS + VALIDATION_SPLITS}
    if lists:  # all of them: a part of the images listed for another split must not be held out for this one
        return _pair(images, masks, lists[resolve_split(split, lists, root)])
    whole = _pair(images, masks)
    if not hold_out:
        return whole
    if split not in TRAIN_SPLITS + VALIDATION_SPLITS:
        raise ValueError(
            f'Expected the split train or validation of {root!r}, which is not split, got {split!r}. List the images '
            f'of the split in {split}.txt there.'
        )
    is_training = split in TRAIN_SPLITS
    chosen = [index for index in range(len(whole)) if (index % HELD_OUT_EVERY != 0) == is_training]
    if not chosen:
        raise ValueError(f'Expected at least two images in {images!r} to keep one for validation, got {len(whole)}.')
    _logger.info(
        f'{root} has no splits: every {HELD_OUT_EVERY}th image by name is for validation, these are {len(chosen)} of '
        f'{len(whole)} images for {split}'
    )
    return FileSource([whole.images[index] for index in chosen], [whole.masks[index] for index in chosen])


def _files_by_stem(folder: str, extensions: Tuple[str, ...]) -> Dict[str, str]:
    """First file in the order of the extensions, so that it does not hang on the file system."""
    found: Dict[str, str] = {}
    if not os.path.isdir(folder):
        raise ValueError(f'Expected a folder {folder!r}, which does not exist. {LAYOUTS}')
    names = [entry for entry in sorted(os.listdir(folder)) if entry.lower().endswith(extensions)]
    for name in sorted(names, key=lambda name: extensions.index(os.path.splitext(name)[1].lower())):
        found.setdefault(os.path.splitext(name)[0], os.path.join(folder, name))
    return found


def _pair(images: str, masks: str, listed: Optional[str] = None, class_names: Optional[List[str]] = None) -> FileSource:
    """Files of a split by stem, in the order of its list or of the names."""
    image_files, mask_files = _files_by_stem(images, IMAGE_EXTENSIONS), _files_by_stem(masks, MASK_EXTENSIONS)
    stems = sorted(image_files)
    if listed is not None:
        lines = read_lines(listed)
        stems = [os.path.splitext(line)[0] if line.lower().endswith(IMAGE_EXTENSIONS) else line for line in lines]
        for stem in stems:
            if stem not in image_files:
                raise ValueError(f'Expected an image {stem!r} in {images!r}, as {listed!r} lists it, found none.')
    if not stems:
        raise ValueError(f'Expected images in {listed or images!r}, found none. {LAYOUTS}')
    for stem in stems:
        if stem not in mask_files:
            raise ValueError(
                f'Expected a mask {stem} in {masks!r} for the image {image_files[stem]!r}, found none with one of '
                f'the endings {", ".join(MASK_EXTENSIONS)}. Add it, or leave the image out.'
            )
    return FileSource([image_files[stem] for stem in stems], [mask_files[stem] for stem in stems], class_names)
