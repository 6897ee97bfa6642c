"""Finds the mask of each image by its name: the same stem, or the stem with a suffix that all masks have"""

import logging
import os
import re
from collections import Counter
from typing import Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from ...checks import shorten
from ...data.images import IMAGE_ENDINGS, is_hidden

_logger = logging.getLogger(__name__)

# of files with one stem the JPEG is the image
IMAGE_EXTENSIONS = tuple(sorted(IMAGE_ENDINGS, key=lambda ending: ending not in ('.jpg', '.jpeg')))
MASK_EXTENSIONS = ('.png', '.tif', '.tiff', '.bmp', '.gif')  # lossless: JPEG would change class indices
_SEPARATORS = '_-. '
_TAIL = re.compile(r'[_\-. ][^_\-. ]*[A-Za-z][^_\-. ]*$')  # last part of a name, with a letter in it


def files_by_stem(folder: str, extensions: Tuple[str, ...]) -> Dict[str, str]:
    """Files of a folder by stem. Of files with the same stem the one whose extension is listed first counts."""
    found: Dict[str, str] = {}
    names = [entry for entry in sorted(os.listdir(folder)) if entry.lower().endswith(extensions)]
    names = [name for name in names if not is_hidden(name)]
    for name in sorted(names, key=lambda name: extensions.index(os.path.splitext(name)[1].lower())):
        found.setdefault(os.path.splitext(name)[0], os.path.join(folder, name))
    return found


def find_masks(folder: str, images: Mapping[str, str], stems: Sequence[str]) -> List[str]:
    """Find the masks of images.

    A mask has the stem of its image. If masks are called otherwise, such as cat_mask.png for cat.jpg, they are found
    if that is certain: each image has exactly one of them, and all have the same suffix.

    Args:
        folder: Folder with the masks.
        images: Files of all images by stem.
        stems: Stems of the images whose masks are asked for.

    Returns:
        Files of the masks, in the order of the stems.

    Raises:
        ValueError: An image has no mask. The message says what the folder has in its place.
    """
    masks = files_by_stem(folder, MASK_EXTENSIONS)
    missing = [stem for stem in stems if stem not in masks]
    if not missing:
        return [masks[stem] for stem in stems]
    for tail in ('', _common_tail(list(images))):
        if tail is None:
            continue
        keys = {stem: stem[: len(stem) - len(tail)] for stem in images}
        owned = _masks_by_owner(masks, keys.values())
        suffix = _common_suffix({key: owned[key] for key in (keys[stem] for stem in stems)}, bool(tail))
        if suffix is not None:
            replaced = f'{suffix!r} in place of {tail!r}' if tail else f'{suffix!r} behind those of the images'
            _logger.info(f'Masks in {folder} have names with {replaced}, such as {keys[stems[0]]}{suffix}')
            return [masks[keys[stem] + suffix] for stem in stems]
    raise ValueError(
        f'Expected a mask {missing[0]} in {folder!r} for the image {images[missing[0]]!r}, found '
        f'{_describe(folder, masks, missing[0], images)}'
    )


def _common_tail(stems: Sequence[str]) -> Optional[str]:
    """The last part that the names of all images have in common, such as _leftImg8bit."""
    match = _TAIL.search(stems[0])
    tail = match.group() if match else ''
    return tail if tail and all(stem.endswith(tail) and stem != tail for stem in stems) else None


def _masks_by_owner(masks: Mapping[str, str], keys: Iterable[str]) -> Dict[str, List[str]]:
    """Stems of the masks that begin with the name of an image, by the longest name that does."""
    owned: Dict[str, List[str]] = {key: [] for key in keys}
    for mask in masks:
        ends = [len(mask), *(i for i in range(len(mask) - 1, 0, -1) if mask[i] in _SEPARATORS)]
        owner = next((mask[:end] for end in ends if mask[:end] in owned), None)
        if owner is not None:
            owned[owner].append(mask)
    return owned


def _common_suffix(owned: Mapping[str, Sequence[str]], may_be_empty: bool) -> Optional[str]:
    """What each image has one mask with, behind its name. None if that is not certain, or is a number alone."""
    suffixes = {mask[len(key) :] for key, names in owned.items() for mask in names}
    if len(suffixes) != 1 or any(len(names) != 1 for names in owned.values()):
        return None
    (suffix,) = suffixes
    return suffix if re.search('[A-Za-z]', suffix) or (may_be_empty and not suffix) else None


def _describe(folder: str, masks: Mapping[str, str], stem: str, images: Mapping[str, str]) -> str:
    """What a folder of masks has in place of the mask of an image, and what to do about it."""
    own = sorted(os.path.basename(masks[key]) for key in _masks_by_owner(masks, [*images, stem])[stem])
    if own:
        others = [key for key in masks if key not in images]
        return (
            f'{len(others)} masks like {own[0]!r}, expected {stem + os.path.splitext(own[0])[1]!r}. This image has '
            f'{len(own)} ({shorten(own, 3)}): a mask with a suffix is taken if each image has one and all have the '
            'same suffix. Rename them, or move the others away.'
        )
    wanted = f'none with one of the endings {", ".join(MASK_EXTENSIONS)}'
    names = [name for name in sorted(os.listdir(folder)) if not is_hidden(name)]
    lossy = [name for name in names if name.lower().endswith(('.jpg', '.jpeg'))]
    if lossy:
        return (
            f'{wanted}, but {len(lossy)} JPEG files like {lossy[0]!r}. JPEG changes class indices, at edges most of '
            'all: save the masks as PNG where they were drawn. Those in black and white can be repaired: '
            "Image.open(file).convert('L').point(lambda value: value > 127).save('x.png')."
        )
    if masks:
        first = os.path.basename(next(iter(masks.values())))
        return f'{wanted} and this name, but {len(masks)} masks like {first!r}. Rename them, or leave the image out.'
    return f'{wanted}{contents_of(folder)}. Add it, or leave the image out.'


def contents_of(folder: str) -> str:
    """What a folder has, as the end of a sentence: names of folders, and numbers of files by ending."""
    folders: List[str] = []
    endings: Counter[str] = Counter()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith('.'):
            continue
        if entry.is_dir():
            folders.append(f'{entry.name}/')
        else:
            endings[os.path.splitext(entry.name)[1].lower() or 'no'] += 1
    parts = [shorten(folders, 8)] if folders else []
    parts += [f'{count} {"file" if count == 1 else "files"} with the ending {e}' for e, count in endings.most_common(4)]
    return f', but {", ".join(parts)}' if parts else '; it is empty'
