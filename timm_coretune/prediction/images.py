"""Finds the images to classify, and opens them for batches"""

import logging
import os
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from ..checks import shorten
from ..data.images import IMAGE_ENDINGS, UnreadableImageError, convert, is_hidden, kind_of_file, open_image, upright

_logger = logging.getLogger(__name__)

LIST_ENDING = '.txt'


def find_images(paths: Sequence[str]) -> List[str]:
    """List image files: those that are given, those in the given folders and below, and those that lists name.

    A list is a .txt file with a path in each line, relative to the list. Files in folders that have not the ending of
    an image are left out, and counted in the log.

    Raises:
        ValueError: A path does not exist, or there are no images.
    """
    found: List[str] = []
    others: List[str] = []
    for path in paths:
        if os.path.isdir(path):
            for folder, subfolders, names in os.walk(path, followlinks=True):
                subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
                for file in (os.path.join(folder, name) for name in sorted(names) if not is_hidden(name)):
                    is_image = file.lower().endswith(IMAGE_ENDINGS) and not kind_of_file(file)
                    (found if is_image else others).append(file)
        elif not os.path.lexists(path):
            raise ValueError(f'Expected an image, a folder or a list in {path!r}, there is nothing. Check the path.')
        elif path.lower().endswith(LIST_ENDING):
            found += _read_list(path)
        else:
            found.append(path)
    if others:
        _logger.warning(f'{len(others)} left out, as they are no images by their endings: {shorten(others)}.')
    if not found:
        raise ValueError(f'Expected images ({" ".join(IMAGE_ENDINGS)}) in {", ".join(paths)}, found none.')
    return found


def _read_list(path: str) -> List[str]:
    try:
        with open(path, encoding='utf-8') as f:
            lines = [line.strip() for line in f]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f'Expected a list of paths, one a line, in {path!r}: {e}.') from e
    return [os.path.join(os.path.dirname(path), line) for line in lines if line]


class Unreadable(NamedTuple):
    """Stands for an image that cannot be read."""

    reason: str


class ImagesToPredict(Dataset):
    """Images as the model takes them, or why they cannot be read.

    Args:
        images: Paths, images of PIL, or tensors that are prepared.
        transform: Makes a tensor of an image of PIL.
        mode: PIL mode of the images of the model.
    """

    def __init__(
        self, images: Sequence[Union[str, os.PathLike, Image.Image, torch.Tensor]], transform: Callable, mode: str
    ):
        self.images = images
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Union[torch.Tensor, Unreadable]:
        image = self.images[index]
        if isinstance(image, torch.Tensor):
            return image
        try:
            if not isinstance(image, Image.Image):
                return self.transform(open_image(image, self.mode))
            return self.transform(convert(upright(image), self.mode))
        except UnreadableImageError as e:
            return Unreadable(f'{e}')


def collate(items: Sequence[Any]) -> Tuple[Optional[torch.Tensor], List[Optional[str]]]:
    """A batch of the images that can be read (B, C, H, W), None if there is none, and what is wrong with each."""
    reasons = [item.reason if isinstance(item, Unreadable) else None for item in items]
    images = [item for item in items if not isinstance(item, Unreadable)]
    return default_collate(images) if images else None, reasons
