"""Augmentation of batches: random numbers against those of torchvision, operations against it image by image"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from waits import CUDA, fake_cuda

from timm_coretune.data.device_augment import CollateStored, DeviceAugment
from timm_coretune.data.resumable import make_resumable
from timm_coretune.data.seeding import seeded

AUGMENT = DeviceAugment((16, 20), 24, vflip=0.3, color_jitter=0.4, color_jitter_prob=0.7, grayscale_prob=0.2)


def picture(number, width=40, height=30, mode='RGB'):
    generator = torch.Generator().manual_seed(number)
    colors = torch.randint(256, (6, 8, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(colors.numpy()).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def drawn(augment, count, image=None):
    torch.manual_seed(0)
    with seeded(3):
        return torch.stack([augment.draw(image or picture(0)) for _ in range(count)]).double()


def test_boxes_are_distributed_as_those_of_torchvision():
    image = Image.new('RGB', (400, 300))
    box = drawn(AUGMENT, 4000, image)[:, :4] * torch.tensor([300, 400, 300, 400])
    torch.manual_seed(1)
    crop = RandomResizedCrop(1)
    expected = torch.tensor([crop.get_params(image, crop.scale, crop.ratio) for _ in range(4000)]).double()
    torch.testing.assert_close(box, box.round(), rtol=0, atol=1e-3)  # whole pixels of the image, before it is resized

    def statistics(b):
        area, ratio = b[:, 2] * b[:, 3] / 120000, b[:, 3] / b[:, 2]
        free = (b[:, :2] + 0.5) / (torch.tensor([301, 401]) - b[:, 2:])  # place in what the crop leaves free
        return torch.stack([area, ratio.log(), *free.T])

    found, expected = statistics(box), statistics(expected)
    error = (found.var(dim=1) / 4000 + expected.var(dim=1) / 4000).sqrt()
    assert ((found.mean(dim=1) - expected.mean(dim=1)).abs() < 4 * error).all()
    torch.testing.assert_close(found.std(dim=1), expected.std(dim=1), rtol=0.05, atol=0)


def test_the_other_numbers_are_drawn_with_their_probabilities():
    augment = AUGMENT._replace(gaussian_blur_prob=0.4, hflip=0.6)
    draws = drawn(augment, 3000)
    flags, sigma, factors, order = draws[:, 4:8], draws[:, 8], draws[:, 9:12], draws[:, 12:]
    for share, probability in zip(
        [*flags.mean(dim=0), (sigma > 0).double().mean(), (factors != 1).any(dim=1).double().mean()],
        [0.3, 0.6, 0.5, 0.2, 0.4, 0.7],
        strict=True,
    ):
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 3000)
    blurred, jittered = sigma[sigma > 0], (factors != 1).any(dim=1)
    assert blurred.min() >= 0.1
    assert blurred.max() <= 2
    assert abs(blurred.mean() - 1.05) < 0.08
    changed = factors[jittered]
    assert changed.min() >= 0.6
    assert changed.max() <= 1.4
    torch.testing.assert_close(changed.std(dim=0), torch.full((3,), 0.8 / math.sqrt(12)).double(), rtol=0.05, atol=0)
    assert len(order[jittered].unique(dim=0)) == 6
    assert (order.sort(dim=1).values == torch.arange(3)).all()


@pytest.mark.parametrize('interpolation, share', [('bilinear', 0), ('bicubic', 1)])
def test_a_named_interpolation_is_taken_by_all(interpolation, share):
    assert drawn(AUGMENT._replace(interpolation=interpolation), 20)[:, 6].mean() == share


def expected_image(augment, pixels, draws, channels=3):
    """The same by torchvision: an image at a time, in the units and the order of torchvision."""
    top, left, height, width = (draws[:4] * augment.stored_size).tolist()
    assert all(abs(x - round(x)) < 1e-4 for x in (top, left, height, width))
    mode = InterpolationMode.BICUBIC if draws[6] else InterpolationMode.BILINEAR
    box = [round(x) for x in (top, left, height, width)]
    image = F.resized_crop(pixels.permute(2, 0, 1).float(), *box, augment.size, mode, antialias=True).clamp(0, 255)
    image = F.vertical_flip(image) if draws[4] else image
    image = F.horizontal_flip(image) if draws[5] else image
    image = image / 255
    for kind in draws[12:].long().tolist():
        operation = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[kind]
        image = operation(image, draws[9 + kind].item())
    image = F.rgb_to_grayscale(image, channels) if draws[7] else image
    return 255 * (F.gaussian_blur(image, 23, draws[8].item()) if draws[8] else image)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_a_batch_is_what_torchvision_makes_of_each_image(mode):
    # images of the stored size, so that crops of whole pixels stay whole
    augment = AUGMENT._replace(gaussian_blur_prob=0.5)
    with seeded(5):
        samples = [(augment(picture(number, 24, 24, mode)), number) for number in range(24)]
    batch, target = CollateStored(augment)(samples)
    assert target.tolist() == list(range(24))
    assert batch.pixels.dtype == torch.uint8
    assert len({tuple(row) for row in batch.draws[:, [4, 5, 6, 7]].tolist()}) > 8  # all kinds of cases
    found = batch.to(device=torch.device('cpu'), non_blocking=True).to(torch.float32)
    for number, image in enumerate(found):
        assert np.array_equal(batch.pixels[number].squeeze(), np.array(picture(number, 24, 24, mode)))
        expected = expected_image(augment, batch.pixels[number], batch.draws[number], len(mode))
        torch.testing.assert_close(image, expected, rtol=0, atol=0.1)  # torchvision rounds the weights of gray
    assert (batch.to(torch.bfloat16) - found).abs().max() <= 0.5


def test_images_are_stored_at_one_size_as_pil_resizes_them():
    pixels, _ = AUGMENT(picture(1))
    expected = np.array(picture(1).resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    assert pixels.shape == (24, 24, 3)
    assert np.abs(pixels.numpy().astype(int) - expected).max() <= 1


def test_a_crop_of_the_stored_image_is_near_that_of_the_image():
    """The box is drawn in the image, whose sides are resized by other factors: its aspect ratio must not suffer."""
    augment = DeviceAugment((32, 32), 96, scale=(0.3, 1), color_jitter=0, hflip=0, interpolation='bicubic')
    image = picture(2, 160, 120)
    with seeded(1):
        samples = [(augment(image), 0) for _ in range(8)]
    batch, _ = CollateStored(augment)(samples)
    for draws, found in zip(batch.draws, batch.to(torch.float32), strict=True):
        box = (draws[:4] * torch.tensor([120, 160, 120, 160])).round().int().tolist()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        expected = F.resized_crop(pixels.float(), *box, (32, 32), InterpolationMode.BICUBIC, antialias=True)
        assert (found - expected).abs().mean() < 3  # of 255: it is resized twice


@pytest.mark.parametrize(
    'change, channels, message',
    [
        ({}, 4, 'Expected images of 1 or 3 channels for --gpu-augment, got 4'),
        ({'interpolation': 'lanczos'}, 3, "to be bilinear, bicubic, random, got 'lanczos'. Give --train-interpolation"),
        ({'gaussian_blur_prob': 0.1, 'size': (11, 20)}, 3, 'more than 11 pixels for --gaussian-blur-prob, got 11'),
    ],
)
def test_what_it_cannot_do_is_refused(change, channels, message):
    AUGMENT.check(3)
    with pytest.raises(ValueError, match=message):
        AUGMENT._replace(**change).check(channels)


class _Pictures(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return AUGMENT(picture(index)), index


def batches(rank, num_processes, batch_size, workers=0):
    order = DistributedSampler(_Pictures(), num_processes, rank)
    loader = DataLoader(
        _Pictures(), batch_size, sampler=order, drop_last=True, collate_fn=CollateStored(AUGMENT), num_workers=workers
    )
    return [(batch.to(torch.float32), target) for batch, target in make_resumable(loader, 7, rank, num_processes)]


def test_an_image_is_augmented_alike_in_any_number_of_processes_and_workers():
    whole = batches(0, 1, 8)
    shares = [batches(rank, 2, 4) for rank in (0, 1)]
    for (images, targets), *parts in zip(whole, *shares, strict=True):
        for rank, (part, part_targets) in enumerate(parts):
            assert torch.equal(part_targets, targets[rank::2])
            torch.testing.assert_close(part, images[rank::2], rtol=0, atol=1e-3)  # products of batches round as they do
    for (images, _), (again, _) in zip(whole, batches(0, 1, 8, workers=2), strict=True):
        assert torch.equal(images, again)


def test_the_device_is_not_waited_for():
    augment = AUGMENT._replace(gaussian_blur_prob=0.5)
    with fake_cuda() as waits:
        pixels = torch.zeros(4, 24, 24, 3, dtype=torch.uint8)
        batch = CollateStored(augment)([((image, torch.zeros(15)), 0) for image in pixels])[0]
        images = batch.to(device=CUDA, non_blocking=True).to(torch.float16)
        assert images.device.type == 'cuda'
        assert images.shape == (4, 3, 16, 20)
    assert waits.found == []


@pytest.mark.gpu
def test_a_gpu_gives_the_images_of_the_cpu_and_is_not_waited_for():
    with seeded(5):
        samples = [(AUGMENT(picture(number)), number) for number in range(16)]
    batch, _ = CollateStored(AUGMENT)(samples)
    on_device = batch.pin_memory().to(device=torch.device('cuda'), non_blocking=True)
    on_device.to(torch.float32)  # libraries load
    torch.cuda.set_sync_debug_mode('error')
    try:
        images = on_device.to(torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    # a graphics card may multiply in TensorFloat-32
    assert (images.cpu() - batch.to(torch.float32)).abs().max() < 1
