"""Masks in the format of PASCAL VOC: PNG files with a palette, whose indices are the classes"""

from typing import Any, List, Union

import numpy as np
import torch
from PIL import Image

from ...atomic import write_whole

VOC_CLASSES = (
    'background',
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
)


def voc_palette() -> List[int]:
    """Colours of PASCAL VOC for the indices 0 to 255: red, green and blue in turn, 768 values.

    Bits 0, 1 and 2 of an index are the highest bits of red, green and blue. Bits 3, 4 and 5 are the second highest, and
    so on. Neighbouring indices therefore have very different colours.
    """
    palette = []
    for index in range(256):
        for channel in range(3):
            palette.append(sum((index >> 3 * place + channel & 1) << 7 - place for place in range(3)))
    return palette


def save_image(image: Image.Image, path: str, **kwargs: Any) -> None:
    """Write an image file. If writing is interrupted, no half-written file is left.

    Args:
        image: Image to write.
        path: File to write.
        **kwargs: Arguments of PIL's `Image.save`. `format` is required.
    """
    with write_whole(path) as temporary:
        image.save(temporary, **kwargs)


def write_mask(mask: Union[torch.Tensor, np.ndarray], path: str) -> None:
    """Write a mask as a PNG file with the palette of PASCAL VOC.

    Args:
        mask: Class indices (H, W), integers in [0, 255].
        path: File to write.

    Raises:
        ValueError: Shape, dtype or range do not fit.
    """
    values = np.asarray(mask)
    if values.ndim != 2 or values.dtype.kind not in 'iu' or values.size == 0:
        raise ValueError(
            f'Expected a mask of integers (H, W), got {values.dtype} {values.shape}. Take the argmax of logits over '
            'the classes, and one image of a batch.'
        )
    if values.min() < 0 or values.max() > 255:
        raise ValueError(
            f'Expected class indices in [0, 255], got {values.min()} to {values.max()}. A PNG palette has 256 entries.'
        )
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(voc_palette())
    save_image(image, path, format='PNG')
