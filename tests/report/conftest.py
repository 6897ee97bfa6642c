import pytest
import timm
import torch
from report_page import HOSTILE
from runs import train
from safetensors.torch import save_file


@pytest.fixture(scope='session')
def noise(tiny_images):
    """Noise, so that there are mistakes."""
    return tiny_images((8, 8, 8, 8), (6, 6, 6, 6), size=24, names=HOSTILE)


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp('start') / 'start.safetensors'
    model = timm.create_model('test_resnet', num_classes=0)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope='session')
def run(tmp_path_factory, noise, checkpoint):
    """A run with --report."""
    flags = ('--coretune', '--report', '--metrics', 'confusion,per-class', '--pretrained-path', checkpoint)
    return train(noise, tmp_path_factory.mktemp('run'), *flags, '--val-interval', '2')
