"""Augmentation of an image with its mask, and the way back from logits to the size of an image

Colours are interpolated, classes never: a mask takes the nearest pixel. torchvision's `nearest` takes the upper left of
the pixels that meet in a new one, which shifts a mask against its image by up to half the scale. Masks are resized by
`nearest-exact` here, which takes the middle one, as interpolation of colours does.

All draws come from torch's global generator.
"""

from typing import Any, Dict, Sequence, Tuple

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from .masks import IGNORE_INDEX

INTERPOLATIONS = {  # timm's names, as far as tensors can be resized so
    'nearest': InterpolationMode.NEAREST_EXACT,
    'bilinear': InterpolationMode.BILINEAR,
    'bicubic': InterpolationMode.BICUBIC,
}
TO_FLOAT_AND_INDEX = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, 'others': None}


def _interpolation_mode(interpolation: str) -> InterpolationMode:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f'Expected interpolation as one of {", ".join(INTERPOLATIONS)}, got {interpolation!r}.')
    return INTERPOLATIONS[interpolation]


def _resize_mask(mask: torch.Tensor, size: Sequence[int]) -> tv_tensors.Mask:
    image = mask.as_subclass(torch.Tensor)[None]
    return tv_tensors.Mask(functional.resize(image, list(size), InterpolationMode.NEAREST_EXACT)[0])


class _RandomResizedCrop(v2.RandomResizedCrop):
    def transform(self, inpt: Any, params: Dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return _resize_mask(functional.crop(inpt, **params), self.size)
        return super().transform(inpt, params)


class FitAndPad(nn.Module):
    """Resizes image and mask to fit into a size, and fills the rest of it at the bottom and at the right.

    Args:
        img_size: Height and width to fit into.
        fill: Values for the image, one a channel, in [0, 1].
        interpolation: Key of INTERPOLATIONS, for the image.
    """

    def __init__(self, img_size: Tuple[int, int], fill: Sequence[float], interpolation: str):
        super().__init__()
        self.img_size = tuple(img_size)
        self.fill = fill
        self.mode = _interpolation_mode(interpolation)

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Tuple[torch.Tensor, torch.Tensor]:
        size = fitted_size(image.shape[-2:], self.img_size)
        image, mask = functional.resize(image, list(size), self.mode), _resize_mask(mask, size)
        padding = [0, 0, self.img_size[1] - size[1], self.img_size[0] - size[0]]
        image = functional.to_dtype(image, torch.float32, scale=True)  # the mean is no whole number
        return functional.pad(image, padding, self.fill), functional.pad(mask, padding, IGNORE_INDEX)


def create_train_transform(
    img_size: Tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    scale: Tuple[float, float] = (0.5, 1.0),
    ratio: Tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float = 0.0,
    interpolation: str = 'bilinear',
) -> v2.Transform:
    """Random crop, flips and colours.

    Args:
        img_size: Height and width to come out.
        mean: Subtracted from an image in [0, 1], one value a channel.
        std: Divides it then.
        scale: Least and greatest share of the image's area in the crop.
        ratio: Least and greatest width over height of the crop.
        hflip: Probability of a flip left to right.
        vflip: Probability of a flip upside down.
        color_jitter: Greatest relative change of brightness, contrast and saturation, 0 for none.
        interpolation: Key of INTERPOLATIONS, for the image.

    Returns:
        Takes tv_tensors.Image uint8 (C, H, W) and tv_tensors.Mask (H, W), returns float32 and int64 of img_size.
    """
    steps = [_RandomResizedCrop(tuple(img_size), scale, ratio, _interpolation_mode(interpolation))]
    if hflip > 0:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if vflip > 0:
        steps.append(v2.RandomVerticalFlip(vflip))
    if color_jitter > 0:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    return v2.Compose([*steps, *_to_tensors(mean, std)])


def create_eval_transform(
    img_size: Tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = 'bilinear',
) -> v2.Transform:
    """The whole image at its own aspect ratio, in the upper left of img_size; below and right of it are 0 and ignored.

    Args:
        img_size: Height and width to come out, whatever the image has.
        mean: Subtracted from an image in [0, 1], one value a channel.
        std: Divides it then.
        interpolation: Key of INTERPOLATIONS, for the image.

    Returns:
        Takes and returns the same as that of training.
    """
    return v2.Compose([FitAndPad(img_size, list(mean), interpolation), *_to_tensors(mean, std)])


def _to_tensors(mean: Sequence[float], std: Sequence[float]) -> Sequence[nn.Module]:
    return v2.ToDtype(TO_FLOAT_AND_INDEX, scale=True), v2.Normalize(list(mean), list(std)), v2.ToPureTensor()


def fitted_size(size: Tuple[int, int], img_size: Tuple[int, int]) -> Tuple[int, int]:
    """Height and width of an image's content after it was fitted into img_size, at least one pixel each.

    Args:
        size: Height and width of the image.
        img_size: Height and width that it is fitted into.
    """
    (height, width), (max_height, max_width) = size, img_size
    if height * max_width >= width * max_height:
        return max_height, max(1, round(width * max_height / height))
    return max(1, round(height * max_width / width)), max_width


def restore(logits: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Logits of an image without the padding, at the size that it came with.

    Args:
        logits: Logits for the fitted and padded image (num_classes, H, W).
        size: Height and width of the image before.

    Returns:
        Logits (num_classes, *size), interpolated linearly.
    """
    height, width = fitted_size(size, logits.shape[-2:])
    content = logits[None, :, :height, :width]
    return nn.functional.interpolate(content, tuple(size), mode='bilinear', align_corners=False)[0]
