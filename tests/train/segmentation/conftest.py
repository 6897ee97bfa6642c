import pytest
import torch
import torch.nn as nn
from paths import SAMPLE
from segmentation_runs import train

from timm_coretune.segmentation.data.scenes import FashionScenes, write_voc
from timm_coretune.train import Trainer


@pytest.fixture(scope='session')
def voc(tmp_path_factory):
    """8 scenes to train on and 3 to validate on, in the layout of VOC."""
    folder = tmp_path_factory.mktemp('voc')
    write_voc(FashionScenes(SAMPLE, 'train', 8), str(folder), 'train')
    write_voc(FashionScenes(SAMPLE, 'validation', 3), str(folder), 'val')
    return folder


@pytest.fixture(scope='session')
def tuned(voc, tmp_path_factory):
    """The folder of a Core-tuning of one epoch."""
    return train(voc, tmp_path_factory.mktemp('tuned'), '--coretune')


@pytest.fixture
def steps(monkeypatch):
    """What the steps of a run are given, with the loss that plain PyTorch has for it before the step and theirs."""
    seen = []
    original = Trainer._step

    def step(self, inputs, target, *rest):
        (input,) = inputs
        model = self.task.get_eval_model()
        statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.random.fork_rng(), torch.no_grad():  # the same dropout again
            expected = nn.CrossEntropyLoss(ignore_index=255)(model(input), target).item()
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
        original(self, inputs, target, *rest)
        seen.append((input, target, expected, self.meter.last_losses()['loss']))

    monkeypatch.setattr(Trainer, '_step', step)
    return seen
