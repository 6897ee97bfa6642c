"""Images and masks in folders: the layout of PASCAL VOC, or two folders images/ and masks/

The images and masks of a split are given by a source, see the protocol `Source`. This module has the source of files on
disk. libraries.py has sources of torchvision and Hugging Face, scenes.py has a source of synthetic scenes.
"""

import glob
import logging
import os
from pathlib import Path
from typing import Iterable, List, Optional, Protocol, Sequence, Tuple

from PIL import Image

from ...data.images import UnreadableImageError, open_file, reason_of
from .masks import open_mask
from .pairs import IMAGE_EXTENSIONS, contents_of, files_by_stem, find_masks
from .palette import VOC_CLASSES

_logger = logging.getLogger(__name__)

TRAIN_SPLITS = ('train', 'training', 'trainval')
VALIDATION_SPLITS = ('validation', 'val', 'valid', 'eval', 'test')
HELD_OUT_EVERY = 10  # without splits, one image of so many is kept for validation
LAYOUTS = (
    'Either as PASCAL VOC: JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt; or as two folders '
    'images/ and masks/ with files of the same stem: <split>/images and <split>/masks, images/<split> and '
    'masks/<split>, or without splits.'
)
CONVERTER = 'Annotations of COCO, Cityscapes, ADE20K and labelme are converted by timm-coretune masks convert.'


class Source(Protocol):
    """The images and masks of one split.

    A source whose masks were made by unknown programs has a method `load_mask(index)` too, which opens a mask without
    its image. The palettes of its masks are compared. A source that marks pixels to ignore itself has an attribute
    `ignore_index`, the value that it marks them by.
    """

    @property
    def class_names(self) -> Optional[List[str]]:
        """Names of the classes by index, None if the source has no names."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        """Open the image and the mask with this index. PIL may read their pixels later."""

    def name(self, index: int) -> str:
        """Name of the mask with this index in error messages: its file, if it has one."""


class FileSource:
    """Images and masks in files.

    Args:
        images: Files of the images.
        masks: Files of their masks.
        class_names: Names of the classes by index.
    """

    def __init__(self, images: Sequence[str], masks: Sequence[str], class_names: Optional[List[str]] = None):
        self.images = images
        self.masks = masks
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        try:
            image = open_file(self.images[index])
        except Exception as e:  # decoders raise errors of many kinds
            raise UnreadableImageError(f'the image {self.images[index]!r}: {reason_of(e)}') from e
        return image, open_mask(self.masks[index])

    def load_mask(self, index: int) -> Image.Image:
        return open_mask(self.masks[index])

    def name(self, index: int) -> str:
        return self.masks[index]


def resolve_split(split: str, available: Iterable[str], where: str) -> str:
    """Find a split by its name or a synonym: a validation split, for example, may be called `val` or `test`.

    Args:
        split: Name that was asked for.
        available: Names of the splits that exist.
        where: File, folder or data set with these splits, for messages.

    Returns:
        The name among those available.

    Raises:
        ValueError: No split has this name or one of its synonyms.
    """
    available = list(available)
    if split in available:
        return split
    for synonyms in (TRAIN_SPLITS, VALIDATION_SPLITS):
        found = [name for name in synonyms if name in available]
        if split in synonyms and found:
            _logger.info(f'Split {found[0]} of {where} is used as {split}')
            if found[0] == 'test':
                _logger.warning('An epoch that is chosen by test images has a score that is too good.')
            return found[0]
    raise ValueError(
        f'Expected a split {split!r} in {where}, which has {sorted(available)}. Choose one of these, or check the path.'
    )


def open_folders(root: str, split: str, hold_out: bool = True) -> FileSource:
    """Open the images and masks of a split in folders.

    Args:
        root: Folder with one of the known layouts. The layout of PASCAL VOC may also be in its subfolder
            VOCdevkit/VOC20xx or VOC20xx.
        split: Name of the split, or a synonym such as `val` for `validation`.
        hold_out: What to do with folders that have no splits: keep every tenth image for validation if True, use all
            images for every split if False.

    Raises:
        ValueError: The folder has no known layout or no such split, or an image has no mask.
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
        problem = f'found neither{contents_of(root)}' if os.path.isdir(root) else 'which does not exist'
        raise ValueError(f'Expected images and masks in {root!r}, {problem}. {LAYOUTS} {CONVERTER} Check the path.')
    folder = os.path.join(root, resolve_split(split, splits, root))
    return _pair(os.path.join(folder, 'images'), os.path.join(folder, 'masks'))


def read_lines(path: str) -> List[str]:
    """Read the lines of a text file, without empty ones."""
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
    if lists:  # then nothing is held out for a split without a list, as its images may be listed for another split
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
        f'{root} has no splits, so every {HELD_OUT_EVERY}th image by name is kept for validation: {len(chosen)} of '
        f'{len(whole)} images for {split}'
    )
    return FileSource([whole.images[index] for index in chosen], [whole.masks[index] for index in chosen])


def _pair(images: str, masks: str, listed: Optional[str] = None, class_names: Optional[List[str]] = None) -> FileSource:
    """Pair images with masks of the same stem, in the order of the list of the split or else sorted by name."""
    for folder in (images, masks):
        if not os.path.isdir(folder):
            raise ValueError(f'Expected a folder {folder!r}, which does not exist. {LAYOUTS}')
    image_files = files_by_stem(images, IMAGE_EXTENSIONS)
    stems = sorted(image_files)
    if listed is not None:
        lines = read_lines(listed)
        stems = [os.path.splitext(line)[0] if line.lower().endswith(IMAGE_EXTENSIONS) else line for line in lines]
        for stem in stems:
            if stem not in image_files:
                raise ValueError(f'Expected an image {stem!r} in {images!r}, as {listed!r} lists it, found none.')
    if not stems:
        raise ValueError(
            f'Expected images in {listed or images!r}, found none{"" if listed else contents_of(images)}. {LAYOUTS}'
        )
    return FileSource([image_files[stem] for stem in stems], find_masks(masks, image_files, stems), class_names)
