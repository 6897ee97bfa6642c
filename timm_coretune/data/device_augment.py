"""Augmentation on the device: loader processes only decode, draw random numbers and resize to one size

The transforms of torchvision draw one set of random numbers for a batch, and the images of a batch must differ. So the
random numbers of an image are drawn where it is loaded, under its own key (`resumable.py`). They travel with its pixels
and are applied to all images of a batch at once. Batches depend neither on the number of loader processes nor on the
device, and the device is never waited for.
"""

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision.transforms import ColorJitter, GaussianBlur

from .resampling import BLUR_REACH, INTERPOLATIONS, apply_weights, blur_weights, resize_weights

# Columns of the numbers that are drawn for an image
_BOX = slice(0, 4)  # top, left, height and width of the crop, as shares of the image
_FLIP_ROWS, _FLIP_COLUMNS, _BICUBIC, _GRAY, _SIGMA = 4, 5, 6, 7, 8
_FACTORS, _ORDER = slice(9, 12), slice(12, 15)  # of brightness, contrast and saturation, and which of them is the first
_NUM_DRAWS = 15
_GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # of ITU-R 601, as in PIL


class DeviceAugment(NamedTuple):
    """Augmentation of training images, with the meanings and in the order of timm's.

    Attributes:
        size: Height and width of the augmented images.
        stored_size: Height and width to which images are resized in the loader, and from which crops are taken.
        scale: Least and greatest area of a crop, as shares of the image.
        ratio: Range of width over height of a crop.
        interpolation: Filter of the crop: 'bilinear', 'bicubic', or 'random' for either.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Greatest change of brightness, contrast and saturation, as a share.
        color_jitter_prob: Probability of this change. None for always.
        grayscale_prob: Probability of a conversion to gray.
        gaussian_blur_prob: Probability of a Gaussian blur.
    """

    size: Tuple[int, int]
    stored_size: int
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    interpolation: str = 'random'
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    color_jitter_prob: Optional[float] = None
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0

    def check(self, num_channels: int) -> None:
        """Check that images of so many channels can be augmented.

        Raises:
            ValueError: They cannot.
        """
        if num_channels not in (1, 3):
            raise ValueError(
                f'Expected images of 1 or 3 channels for --gpu-augment, got {num_channels}: what their gray is is not '
                'known. Leave the flag out.'
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f'Expected the interpolation of --gpu-augment to be {", ".join(INTERPOLATIONS)}, got '
                f'{self.interpolation!r}. Give --train-interpolation.'
            )
        if self.gaussian_blur_prob and min(self.size) <= BLUR_REACH:
            raise ValueError(
                f'Expected images of more than {BLUR_REACH} pixels for --gaussian-blur-prob, got {min(self.size)}.'
            )

    def __call__(self, image: Image.Image) -> Tuple[torch.Tensor, torch.Tensor]:
        """Draw the random numbers of an image (15,) float32, and resize it to the stored size (H, W, C) uint8."""
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        size = (self.stored_size, self.stored_size)
        if pixels.shape[:2] != size:  # torch takes a third of the time of PIL, and differs by no more than 1
            batch = pixels.permute(2, 0, 1)[None]
            pixels = F.interpolate(batch, size, mode='bicubic', antialias=True)[0].permute(1, 2, 0).contiguous()
        return pixels, self.draw(image)

    def draw(self, image: Image.Image) -> torch.Tensor:
        """Draw the random numbers of an image from the generators of Python and torch."""
        width, height = image.size
        top, left, crop_height, crop_width = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        box = (top / height, left / width, crop_height / height, crop_width / width)
        vflip, hflip, bicubic, jitter, gray, blur = torch.rand(6).tolist()
        is_bicubic = bicubic < 0.5 if self.interpolation == 'random' else self.interpolation == 'bicubic'
        sigma = GaussianBlur.get_params(0.1, 2.0) if blur < self.gaussian_blur_prob else 0.0
        factors, order = [1.0] * 3, [0, 1, 2]
        if self.color_jitter and (self.color_jitter_prob is None or jitter < self.color_jitter_prob):
            spread: Any = ColorJitter(*[self.color_jitter] * 3)
            places, *found = ColorJitter.get_params(spread.brightness, spread.contrast, spread.saturation, spread.hue)
            factors, order = found[:3], [place for place in places.tolist() if place < 3]  # the fourth is the hue
        flags = (vflip < self.vflip, hflip < self.hflip, is_bicubic, gray < self.grayscale_prob)
        return torch.tensor([*box, *map(float, flags), sigma, *factors, *order])

    def apply(self, pixels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Augment images (B, H, W, C) uint8 by their draws (B, 15). Returns float32 (B, C, *size) from 0 to 255."""
        box = draws[:, _BOX] * self.stored_size
        bicubic = draws[:, _BICUBIC] > 0
        sides = ((0, _FLIP_ROWS), (1, _FLIP_COLUMNS))
        of_rows, of_columns = (
            resize_weights(
                box[:, i], box[:, i + 2], draws[:, flip] > 0, bicubic, self.stored_size, self.size[i]
            ) for i, flip in sides
        )  # fmt: skip
        images = apply_weights(pixels.float(), of_rows, of_columns).clamp(0, 255)  # bicubic weights overshoot
        if self.color_jitter:
            images = _jitter(images, draws[:, _FACTORS], draws[:, _ORDER].long())
        if self.grayscale_prob:
            images = torch.where(draws[:, _GRAY, None, None, None] > 0, _gray(images), images)
        if self.gaussian_blur_prob:
            images = apply_weights(images.movedim(1, 3), *(blur_weights(draws[:, _SIGMA], size) for size in self.size))
        return images


def _gray(images: torch.Tensor) -> torch.Tensor:
    """Gray value of every pixel (B, 1, H, W). Images of one channel are gray."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return _GRAY_WEIGHTS[0] * red + _GRAY_WEIGHTS[1] * green + _GRAY_WEIGHTS[2] * blue


def _jitter(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Change brightness (0), contrast (1) and saturation (2) of each image by its factors (B, 3) in its order (B, 3).

    All three blend an image with another: black, its mean gray, and its gray values.
    """
    for kind in order.split(1, dim=1):
        factor, kind = factors.gather(1, kind)[..., None, None], kind[..., None, None]
        gray = _gray(images)
        other = torch.where(kind == 1, gray.mean(dim=(2, 3), keepdim=True), gray).masked_fill(kind == 0, 0.0)
        images = (factor * images + (1 - factor) * other).clamp(0, 255)
    return images


class StoredBatch:
    """A batch of images that are not augmented yet, with their draws.

    timm's loader moves a batch to the device by `to(device=...)`, then casts it by `to(dtype)` to normalise it. This
    batch becomes the augmented images when it is cast, so that timm's loader does the rest as with any other: copies
    and kernels beside those of the training, normalisation, random erasing.
    """

    def __init__(self, pixels: torch.Tensor, draws: torch.Tensor, augment: DeviceAugment):
        self.pixels = pixels
        self.draws = draws
        self.augment = augment

    def __len__(self) -> int:
        return len(self.pixels)

    def pin_memory(self) -> 'StoredBatch':
        return StoredBatch(self.pixels.pin_memory(), self.draws.pin_memory(), self.augment)

    def to(self, dtype: Optional[torch.dtype] = None, **where: Any) -> Any:
        """Move to a device, or with a dtype augment: the images (B, C, height, width) from 0 to 255 in this dtype."""
        if dtype is not None:
            return self.augment.apply(self.pixels, self.draws).to(dtype)
        return StoredBatch(self.pixels.to(**where), self.draws.to(**where), self.augment)


class CollateStored:
    """Makes a StoredBatch, and a tensor of targets, of images that a DeviceAugment prepared and their targets."""

    def __init__(self, augment: DeviceAugment):
        self.augment = augment

    def __call__(self, samples: List[Tuple[Tuple[torch.Tensor, torch.Tensor], Any]]) -> Tuple[StoredBatch, Any]:
        stored, targets = zip(*samples, strict=True)
        pixels, draws = (torch.stack(part) for part in zip(*stored, strict=True))
        target = default_collate(list(targets))
        return StoredBatch(pixels, draws, self.augment), target.long() if target.ndim == 1 else target
