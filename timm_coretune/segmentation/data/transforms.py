"""Transforms of an image together with its mask, and the way back from logits to the size of an image

The colours of an image are interpolated. The classes of a mask are not: each new pixel takes the class of the nearest
old one. Masks are resized with torchvision's `nearest-exact`, which takes the pixel in the middle. Its `nearest` takes
the upper left one, which shifts a mask against its image by up to half the scale.

All random numbers come from torch's global generator.
"""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from timm.data.loader import adapt_to_chs
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from .masks import IGNORE_INDEX

INTERPOLATIONS = {  # by timm's name; torchvision resizes tensors by no other method that timm has
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
    """Resizes image and mask to fit into a given size, and pads them to it at the bottom or at the right.

    The aspect ratio is kept. The padding of the mask is ignored in training and validation.

    Args:
        img_size: Height and width to return.
        fill: Value of the padding of the image in [0, 1], one for each channel.
        interpolation: Method to resize the image by, a key of INTERPOLATIONS.
        ignore_index: Value of the padding of the mask.
    """

    def __init__(
        self,
        img_size: Tuple[int, int],
        fill: Sequence[float],
        interpolation: str,
        ignore_index: int = IGNORE_INDEX,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        height, width = img_size
        self.img_size = (height, width)
        self.fill = fill
        self.mode = _interpolation_mode(interpolation)

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Tuple[torch.Tensor, torch.Tensor]:
        height, width = image.shape[-2:]
        size = fitted_size((height, width), self.img_size)
        image, mask = functional.resize(image, list(size), self.mode), _resize_mask(mask, size)
        padding = [0, 0, self.img_size[1] - size[1], self.img_size[0] - size[0]]
        image = functional.to_dtype(image, torch.float32, scale=True)  # before padding: the fill is no whole number
        mask = tv_tensors.Mask(mask.long())  # before padding: any number may mark pixels to ignore
        return functional.pad(image, padding, self.fill), functional.pad(mask, padding, self.ignore_index)


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
    """Create the transform of training: random crop, flips and change of colours.

    Args:
        img_size: Height and width to return.
        mean: Mean of each channel, subtracted from an image in [0, 1].
        std: Standard deviation of each channel. The image is divided by it after the mean was subtracted.
        scale: Smallest and largest area of the crop, as a share of the area of the image.
        ratio: Smallest and largest width of the crop, divided by its height.
        hflip: Probability to flip left and right.
        vflip: Probability to flip top and bottom.
        color_jitter: Largest relative change of brightness, contrast and saturation, 0 for none.
        interpolation: Method to resize the image by, a key of INTERPOLATIONS.

    Returns:
        A transform that takes tv_tensors.Image uint8 (C, H, W) and tv_tensors.Mask (H, W). It returns two tensors of
        img_size: the image as float32 and the mask as int64.
    """
    steps: List[v2.Transform] = [_RandomResizedCrop(tuple(img_size), scale, ratio, _interpolation_mode(interpolation))]
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
    ignore_index: int = IGNORE_INDEX,
) -> v2.Transform:
    """Create the transform of validation: fit the whole image into img_size at its own aspect ratio, and pad.

    The image is in the upper left. The padding is 0 after normalization, and its pixels are ignored in the mask.

    Args:
        img_size: Height and width to return.
        mean: Mean of each channel, subtracted from an image in [0, 1].
        std: Standard deviation of each channel. The image is divided by it after the mean was subtracted.
        interpolation: Method to resize the image by, a key of INTERPOLATIONS.
        ignore_index: Value that the padding of the mask gets.

    Returns:
        A transform that takes tv_tensors.Image uint8 (C, H, W) and tv_tensors.Mask (H, W). It returns two tensors of
        img_size: the image as float32 and the mask as int64.
    """
    return v2.Compose([FitAndPad(img_size, list(mean), interpolation, ignore_index), *_to_tensors(mean, std)])


def _to_tensors(mean: Sequence[float], std: Sequence[float]) -> Sequence[nn.Module]:
    return v2.ToDtype(TO_FLOAT_AND_INDEX, scale=True), v2.Normalize(list(mean), list(std)), v2.ToPureTensor()


def adapt_data_config(data_config: Dict[str, Any]) -> Dict[str, Any]:
    """The preprocessing of images with masks, from timm's for images.

    Images with masks are tensors, which are resized in fewer ways than PIL's images: where timm names another
    interpolation it becomes bicubic. Mean and standard deviation get a value for each channel.

    Args:
        data_config: What timm.data.resolve_data_config returns.
    """
    interpolation, channels = data_config['interpolation'], data_config['input_size'][0]
    return {
        **data_config,
        'interpolation': interpolation if interpolation in INTERPOLATIONS else 'bicubic',
        'mean': adapt_to_chs(data_config['mean'], channels),
        'std': adapt_to_chs(data_config['std'], channels),
    }


def fitted_size(size: Tuple[int, int], img_size: Tuple[int, int]) -> Tuple[int, int]:
    """Height and width of an image after it was fitted into img_size, without padding. Both are at least 1.

    Args:
        size: Height and width of the image.
        img_size: Height and width that the image is fitted into.
    """
    (height, width), (max_height, max_width) = size, img_size
    if height * max_width >= width * max_height:
        return max_height, max(1, round(width * max_height / height))
    return max(1, round(height * max_width / width)), max_width


def restore(logits: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Undo the fitting and padding of an image: cut the padding off its logits and resize them to the original size.

    Args:
        logits: Logits of the fitted and padded image (num_classes, H, W).
        size: Height and width of the original image.

    Returns:
        Logits (num_classes, *size), interpolated bilinearly.
    """
    padded_height, padded_width = logits.shape[-2:]
    height, width = fitted_size(size, (padded_height, padded_width))
    content = logits[None, :, :height, :width]
    return nn.functional.interpolate(content, tuple(size), mode='bilinear', align_corners=False)[0]
