"""fine_tune: its seed, the caller's generators, and one number of batches per update"""

import math
import random

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from timm_coretune.train import fine_tune
from timm_coretune.train.cli.settings import OptimizationSettings
from timm_coretune.train.loop import LoopConfig
from timm_coretune.train.loss_meter import DivergedError


class Noise(Dataset):
    """Images with noise from all three generators, which stands for augmentation. `drawn` has their first pixels."""

    def __init__(self):
        self.drawn = []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.rand(3, 32, 32)
        image[1] *= random.random()
        image[2] *= np.random.rand()  # noqa: NPY002
        self.drawn.append(tuple(image[:, 0, 0].tolist()))
        return image, index % 2


def tuned(global_seed=0, **kwargs):
    """What three epochs drew for augmentation, and the weights after them."""
    data = Noise()
    model = timm.create_model('test_resnet', num_classes=2)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.1)
    torch.manual_seed(global_seed)
    random.seed(global_seed)
    np.random.seed(global_seed)  # noqa: NPY002
    fine_tune(model, DataLoader(data, 4, shuffle=True), epochs=3, accelerator=Accelerator(cpu=True), **kwargs)
    return data.drawn, b''.join(p.detach().numpy().tobytes() for p in model.parameters())


def test_the_seed_decides_on_all_draws():
    assert tuned(0, seed=1) == tuned(5, seed=1)
    (drawn, weights), (others, other_weights) = tuned(0, seed=1), tuned(0, seed=2)
    assert not set(drawn) & set(others)
    assert weights != other_weights
    assert tuned(0, config=LoopConfig(seed=2, eval_metric='loss')) == (others, other_weights)


def test_without_a_seed_that_of_the_caller_decides():
    first, again, other = tuned(1), tuned(1), tuned(2)
    assert first == again
    assert not set(first[0]) & set(other[0])


@pytest.mark.parametrize('coretune', [True, False])
def test_the_generators_of_the_caller_are_as_before(coretune):
    def draws():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    data = DataLoader(Noise(), 4, shuffle=True)
    model = timm.create_model('test_resnet', num_classes=2)
    found = []
    for trains in (False, True):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        if trains:
            fine_tune(model, data, epochs=1, coretune=coretune, accelerator=Accelerator(cpu=True))
        found.append(draws())
    assert found[0] == found[1]


def test_the_generators_of_the_caller_are_as_before_when_training_fails():
    model, data = torch.nn.Linear(1, 2), DataLoader([(torch.tensor([math.nan]), i % 2) for i in range(8)], 4)
    state = torch.get_rng_state(), random.getstate()
    with pytest.raises(DivergedError):
        fine_tune(model, data, epochs=1, coretune=False, accelerator=Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def test_a_score_of_the_validation_selects_nothing_where_nothing_is_validated(messages):
    config = LoopConfig(eval_metric='top1', patience=1)
    data = DataLoader([(torch.tensor([float(i % 2)]), i % 2) for i in range(8)], 4)
    results = fine_tune(
        torch.nn.Linear(1, 2), data, epochs=4, coretune=False, config=config, accelerator=Accelerator(cpu=True)
    )
    losses = [result['train']['loss'] for result in results]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4
    assert not any('stopping' in message for message in messages())


@pytest.mark.parametrize('of_loop, of_rate', [(4, 1), (1, 4), (4, 4)])
def test_the_rate_is_that_of_the_batches_of_an_update(messages, of_loop, of_rate):
    fine_tune(
        timm.create_model('test_resnet', num_classes=2),
        DataLoader([(torch.rand(3, 32, 32), i % 2) for i in range(16)], batch_size=4),
        config=LoopConfig(grad_accum_steps=of_loop),
        optimization=OptimizationSettings(epochs=1, warmup_epochs=0, grad_accum_steps=of_rate, lr_base=0.16),
        accelerator=Accelerator(cpu=True),
    )
    assert 'Learning rate (0.01) calculated from base learning rate (0.16) and effective global batch size (16)' in (
        ' '.join(messages())
    )


def test_two_numbers_of_batches_for_an_update_are_refused():
    with pytest.raises(ValueError, match='grad_accum_steps 4 in config and 2 in optimization'):
        fine_tune(
            timm.create_model('test_resnet', num_classes=2),
            [],
            config=LoopConfig(grad_accum_steps=4),
            optimization=OptimizationSettings(grad_accum_steps=2),
        )
