"""Runs with --gpu-augment, which work on a CPU too"""

import json

import pytest
from PIL import Image
from runs import outcome, stop_at, train

from timm_coretune.data import device_augment

FLAGS = (
    *('--gpu-augment', '--coretune', '--vflip', '0.5', '--grayscale-prob', '0.3', '--reprob', '0.5', '--mixup', '0.3'),
    *('--recovery-interval', '1', '--epochs', '2'),
)


@pytest.mark.parametrize(
    'flags', [(), ('--channels-last', '--amp', '--amp-dtype', 'bfloat16')], ids=['plain', 'channels-last-bfloat16']
)
def test_a_run_goes_on_bit_by_bit(tiny, tmp_path, monkeypatch, flags):
    straight = train(tiny, tmp_path / 'straight', *FLAGS, *flags)
    with monkeypatch.context() as context:
        stop_at(context, '_step', 4)
        train(tiny, tmp_path / 'broken', *FLAGS, *flags)
    broken = train(tiny, tmp_path / 'broken', *FLAGS, *flags, '--resume', 'auto')
    assert outcome(broken) == outcome(straight)


def test_the_images_of_a_run_are_augmented_in_batches(tiny, tmp_path, monkeypatch):
    shapes = []
    apply = device_augment.DeviceAugment.apply

    def noting(self, pixels, draws):
        images = apply(self, pixels, draws)
        shapes.append((tuple(pixels.shape), tuple(images.shape)))
        return images

    monkeypatch.setattr(device_augment.DeviceAugment, 'apply', noting)
    folder = train(tiny, tmp_path, '--gpu-augment', '--epochs', '1', '--save-images')
    assert shapes == [((8, 37, 37, 3), (8, 3, 32, 32))] * 3  # 32 / 0.875
    assert Image.open(folder / 'train-batch-0.jpg').size == (8 * 32, 32)
    # validation and the published transform are as without the flag
    assert json.loads((folder / 'config.json').read_text())['pretrained_cfg']['input_size'] == [3, 32, 32]


def test_gray_images_are_augmented_too(tiny, tmp_path):
    train(tiny, tmp_path, '--gpu-augment', '--in-chans', '1', '--epochs', '1', '--gaussian-blur-prob', '0.5')


def test_channels_without_a_gray_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match='1 or 3 channels for --gpu-augment, got 4'):
        train(tiny, tmp_path, '--gpu-augment', '--in-chans', '4', '--input-img-mode', 'RGBA')
