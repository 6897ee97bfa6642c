"""Crops and blur by products with matrices: against torchvision, image by image, and against PIL"""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from timm_coretune.data.resampling import BLUR_REACH, apply_weights, blur_weights, resize_weights

SIZE, NEW = 32, (20, 26)
# top, left, height, width: the whole image, smaller and larger than the result, one pixel, and a corner
BOXES = ((0, 0, 32, 32), (3, 5, 24, 17), (10, 2, 8, 30), (31, 31, 1, 1), (18, 20, 14, 12), (1, 0, 31, 9))
FLIPS = ((False, False), (True, False), (False, True), (True, True), (False, False), (True, True))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (len(BOXES), SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)


def crop(images, boxes, flips, bicubic):
    boxes, flips = torch.tensor(boxes, dtype=torch.float32), torch.tensor(flips)
    filters = torch.full((len(boxes),), bicubic)
    weights = (
        resize_weights(boxes[:, i], boxes[:, i + 2], flips[:, i], filters, images.shape[1 + i], NEW[i]) for i in (0, 1)
    )
    return apply_weights(images.float(), *weights)


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_crops_are_those_of_torchvision(images, mode):
    found = crop(images, BOXES, FLIPS, mode == 'bicubic')
    for image, box, (rows, columns), result in zip(images, BOXES, FLIPS, found, strict=True):
        expected = F.resized_crop(image.permute(2, 0, 1).float(), *box, NEW, InterpolationMode(mode), antialias=True)
        expected = F.vertical_flip(expected) if rows else expected
        expected = F.horizontal_flip(expected) if columns else expected
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)  # of 255


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_crops_are_those_of_pil_but_for_its_rounding(images, mode):
    images = 64 + images // 2  # bicubic weights overshoot, and PIL cuts that off between rows and columns
    found = crop(images, BOXES, [(False, False)] * 6, mode == 'bicubic').clamp(0, 255)
    for image, (top, left, height, width), result in zip(images, BOXES, found, strict=True):
        part = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
        expected = np.array(part.resize(NEW[::-1], Image.Resampling[mode.upper()])).astype(float)
        assert np.abs(result.permute(1, 2, 0).numpy() - expected).max() < 2  # PIL rounds rows, then columns


def test_a_crop_between_pixels_is_the_shifted_ramp_and_stays_in_its_box():
    ramp = torch.arange(float(SIZE)).expand(1, SIZE, SIZE)[..., None]  # the value of a pixel is its column
    found = crop(ramp, [(4.0, 6.25, 10.0, 13.0)], [(False, False)], False)[0, 0]
    columns = 6.25 + 13 * (torch.arange(NEW[1]) + 0.5) / NEW[1] - 0.5
    torch.testing.assert_close(found[0, 2:-2], columns[2:-2])
    assert found.min() >= 6
    assert found.max() <= 19


def test_a_crop_narrower_than_a_pixel_is_a_pixel(images):
    found = crop(images[:1], [(7.4, 9.5, 0.01, 0.0)], [(False, False)], True)[0]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, images[0, 7, 9].float()[:, None, None].expand(3, *NEW))


@pytest.mark.parametrize('size', [BLUR_REACH + 1, SIZE])
def test_blur_is_that_of_torchvision(images, size):
    images = images[:3, :size, :size]
    sigma = torch.tensor([0.1, 1.3, 2.0])
    found = apply_weights(images.float(), blur_weights(sigma, size), blur_weights(sigma, size))
    for image, width, result in zip(images, sigma.tolist(), found, strict=True):
        expected = F.gaussian_blur(image.permute(2, 0, 1).float(), 2 * BLUR_REACH + 1, width)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


def test_no_blur_changes_nothing():
    assert torch.equal(blur_weights(torch.zeros(2), 16), torch.eye(16).expand(2, -1, -1))
