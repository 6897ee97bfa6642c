"""Finds the images to predict and the files of their masks, and checks both before any work starts"""

import logging
import os
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..atomic import create_temporary
from ..checks import shorten
from ..data.images import is_hidden, kind_of_file
from .data.pairs import IMAGE_EXTENSIONS

_logger = logging.getLogger(__name__)


class Output(NamedTuple):
    """An image and the file of its mask."""

    image: str
    mask: str


def find_images(paths: Sequence[str]) -> List[str]:
    """List the image files among the given files and in the given folders, in this order.

    What is left out is counted in the log: files of other endings, folders in folders, and what is no regular file.

    Raises:
        ValueError: There are no images, a path does not exist, or the masks of two images would have the same name.
    """
    found: List[str] = []
    left_out: Dict[str, List[str]] = {}
    for path in paths:
        if not os.path.lexists(path):
            raise ValueError(f'Expected an image in {path!r}, there is no such file or folder. Check the path.')
        for file in _entries(path):
            kind = kind_of_file(file)
            if file == path and kind:
                raise ValueError(f'Expected an image in {path!r}: it is {kind}.')
            if kind:
                left_out.setdefault('no regular files', []).append(f'{file} ({kind})')
            elif not file.lower().endswith(IMAGE_EXTENSIONS):
                left_out.setdefault(f'no images by their endings ({" ".join(IMAGE_EXTENSIONS)})', []).append(file)
            elif not is_hidden(file):
                found.append(file)
    if not found:
        raise ValueError(f'Expected images ({", ".join(IMAGE_EXTENSIONS)}) in {", ".join(paths)}, found none.')
    for reason, names in left_out.items():
        _logger.warning(f'{len(names)} left out, as they are {reason}: {shorten(names)}.')
    _refuse_same_masks(found, folds_case=False)
    return found


def _entries(path: str) -> List[str]:
    """The path of a file, or the paths of all that is in a folder."""
    if not os.path.isdir(path):
        return [path]
    try:
        return [os.path.join(path, name) for name in sorted(os.listdir(path))]
    except OSError as e:
        raise ValueError(f'Expected a folder of images in {path!r} that can be read: {e}.') from e


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _refuse_same_masks(images: Sequence[str], folds_case: bool) -> None:
    """Raise an error if two images have the same stem, as one would replace the mask of the other."""
    by_stem: Dict[str, str] = {}
    for path in images:
        stem = _stem(path)
        other = by_stem.setdefault(stem.casefold() if folds_case else stem, path)
        if other != path and (_identity(path) is None or _identity(other) != _identity(path)):
            raise ValueError(
                f'Expected images of different names, {other!r} and {path!r} would give the same mask. Rename one, or '
                'predict them into different folders.'
            )


def plan_outputs(paths: Sequence[str], output: str, overwrite: bool = False) -> List[Output]:
    """Find the images and the masks to write, and see that the masks can be written and replace no image.

    Args:
        paths: Image files, or folders of images.
        output: Folder for the masks, created if missing.
        overwrite: Write masks again that already exist in the folder. Otherwise they are left out, and counted.

    Raises:
        ValueError: There are no images, the folder cannot be written, or a mask would replace an image.
    """
    images = find_images(paths)
    for path in paths:
        if os.path.isdir(path) and os.path.isdir(output) and os.path.samefile(path, output):
            raise ValueError(
                f'Expected a folder for the masks other than that of the images, got {output!r} for both: masks would '
                'replace images, or be taken for images the next time. Choose another --output.'
            )
    outputs = [Output(path, os.path.join(output, f'{_stem(path)}.png')) for path in images]
    _refuse_to_replace_images(outputs)
    _refuse_same_masks(images, _prepare(output))
    todo = [one for one in outputs if overwrite or not os.path.lexists(one.mask)]
    for _, mask in todo:
        if os.path.isdir(mask) and not os.path.islink(mask):
            raise ValueError(f'Expected to write the mask {mask!r}, which is a folder. Rename it.')
    if len(todo) < len(outputs):
        _logger.info(f'{len(outputs) - len(todo)} of {len(outputs)} masks exist already and are skipped.')
    return todo


def _refuse_to_replace_images(outputs: Sequence[Output]) -> None:
    """Raise an error if a mask has the file of an image, whatever links or upper and lower case lead there."""
    images = {_identity(image): image for image, _ in outputs}
    for _, mask in outputs:
        identity = _identity(mask)
        if identity is not None and identity in images:
            raise ValueError(
                f'Expected masks that replace no image, but {mask!r} is the image {images[identity]!r}. Choose another '
                '--output.'
            )


def _identity(path: str) -> Optional[Tuple[int, int]]:
    """What tells the file at a path from all others, whatever its name. None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _prepare(output: str) -> bool:
    """Create the folder of the masks and see that files can be written. Returns whether names ignore the case."""
    try:
        os.makedirs(output, exist_ok=True)
        probe = create_temporary(os.path.join(output, 'a'))
        try:
            folder, name = os.path.split(probe)
            return os.path.lexists(os.path.join(folder, name.upper()))
        finally:
            os.unlink(probe)
    except OSError as e:
        raise ValueError(f'Expected a folder to write masks to in {output!r}: {e}. Choose another --output.') from e
