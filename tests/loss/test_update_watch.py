"""A loss whose parameters the optimizer does not have is noticed, and no other is"""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from small_classifier import SmallClassifier

from timm_coretune import CachedStep, CoreTuningLoss, CoreTuningTask
from timm_coretune.loss import SCLLoss

CLASSES, WIDTH = 3, 5
IMAGES = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 0, 1, 1, 2, 2])
WARNING = 'The optimizer updates the network and not the parameters of CoreTuningLoss'


def create_network():
    return SmallClassifier(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES), CLASSES)


def create_loss(**kwargs):
    return CoreTuningLoss(WIDTH, projection_dim=2, smooth='none', mixtures='none', **kwargs)


def train(model, criterion, update, num_steps=14, loss_of=lambda losses: losses['loss']):
    """A plain loop. Returns whether the projector, if there is one, has moved."""
    before = copy.deepcopy(criterion.state_dict())
    for step in range(num_steps):
        features = model.forward_features(IMAGES)
        losses = criterion.losses(features, model.head(features), TARGET)
        loss_of(losses).backward()
        update(step)
    after = criterion.state_dict()
    return any(not torch.equal(before[name], after[name]) for name in before if 'projector' in name)


def update_by(*optimizers, every=1, to_none=True):
    def update(step):
        if (step + 1) % every == 0:
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=to_none)

    return update


def parameters_of(*modules):
    return [p for module in modules for p in module.parameters()]


@pytest.mark.parametrize('every', [1, 3], ids=['each batch', 'accumulated'])
@pytest.mark.parametrize('create', [torch.optim.SGD, torch.optim.AdamW])
def test_a_forgotten_loss_is_noticed_once(messages, create, every):
    model, criterion = create_network(), create_loss()
    update = update_by(create(model.parameters(), lr=0.1), every=every)
    assert not train(model, criterion, update, 10 * every)  # the tenth update is seen by the step after it
    assert messages('WARNING') == []
    assert not train(model, criterion, update, 11 * every)
    (message,) = messages('WARNING')
    assert message.startswith(WARNING)
    assert '[*model.parameters(), *criterion.parameters()]' in message


@pytest.mark.parametrize('forgotten', [True, False], ids=['forgotten', 'given'])
@pytest.mark.parametrize('every', [1, 66], ids=['each batch', 'accumulated'])
def test_fused_optimizers_are_looked_through(messages, every, forgotten):
    model, criterion = create_network(), create_loss()
    parameters = parameters_of(model) if forgotten else parameters_of(model, criterion)
    version = model.head.weight._version
    update = update_by(torch.optim.AdamW(parameters, lr=0.1, fused=True), every=every)
    assert train(model, criterion, update, 130) != forgotten
    assert model.head.weight._version == version  # which is why values are compared
    assert [message[: len(WARNING)] for message in messages('WARNING')] == [WARNING] * forgotten


@pytest.mark.parametrize('cached', [False, True], ids=['task', 'CachedStep'])
@pytest.mark.parametrize('forgotten', [True, False], ids=['forgotten', 'given'])
def test_a_task_notices_it_too(messages, cached, forgotten):
    task = CoreTuningTask(create_network(), verbose=False)
    module = task.get_trainable_module()
    optimizer = torch.optim.SGD((module.model if forgotten else module).parameters(), lr=0.1)
    step = CachedStep(task, chunk_size=3) if cached else lambda *batch: task(*batch)['loss'].backward()
    for _ in range(12):
        step(IMAGES, TARGET)
        optimizer.step()
        optimizer.zero_grad()
    assert [message[: len(WARNING)] for message in messages('WARNING')] == [WARNING] * forgotten


def test_a_loss_that_is_trained_is_not_warned_of(messages):
    model, criterion = create_network(), create_loss()
    both = torch.optim.SGD(parameters_of(model, criterion), lr=0.1)
    assert train(model, criterion, update_by(both))
    # gradients are zeros between steps, and not None
    model, criterion = create_network(), create_loss()
    both = torch.optim.SGD(parameters_of(model, criterion), lr=0.1)
    assert train(model, criterion, update_by(both, to_none=False))
    # the loss has an optimizer of its own, which begins later
    model, criterion = create_network(), create_loss()
    first, own = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, criterion))
    assert train(model, criterion, lambda step: update_by(*([first] if step < 8 else [first, own]))(step), 30)
    # more batches are accumulated than the number after which values are compared
    model, criterion = create_network(), create_loss()
    both = torch.optim.SGD(parameters_of(model, criterion), lr=0.1)
    assert train(model, criterion, update_by(both, every=70), 72)
    assert messages('WARNING') == []


@pytest.mark.slow
@pytest.mark.parametrize('forgotten', [True, False], ids=['forgotten', 'given'])
def test_the_parameters_of_a_compiled_network_are_found(messages, forgotten):
    model, criterion = create_network(), create_loss()
    parameters = parameters_of(model) if forgotten else parameters_of(model, criterion)
    for name in ('forward_features', 'head'):
        setattr(model, name, torch.compile(getattr(model, name), backend='aot_eager'))
    assert train(model, criterion, update_by(torch.optim.AdamW(parameters, lr=0.1))) != forgotten
    assert [message[: len(WARNING)] for message in messages('WARNING')] == [WARNING] * forgotten


@pytest.mark.parametrize('create', [torch.optim.SGD, torch.optim.AdamW])
def test_a_learning_rate_of_zero_is_an_update(messages, create):
    model, criterion = create_network(), create_loss()
    optimizer = create(parameters_of(model, criterion), lr=0.0, weight_decay=0.0)
    assert not train(model, criterion, update_by(optimizer))
    assert messages('WARNING') == []


def test_skipped_updates_are_none(messages):
    model, criterion = create_network(), create_loss()
    optimizer = torch.optim.SGD(parameters_of(model, criterion), lr=0.1)
    scaler = torch.amp.GradScaler('cpu')

    def update(step):
        model.head.weight.grad.fill_(float('inf'))
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()  # gradients stay, as if no one cleared them

    assert not train(model, criterion, update)
    assert messages('WARNING') == []


@pytest.mark.parametrize('kind', ['frozen', 'no gradient', 'no head', 'evaluation', 'no graph'])
def test_parameters_that_need_no_update_are_not_missed(messages, kind):
    model, criterion = create_network(), create_loss(contrast_weight=0.0 if kind == 'no head' else 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == 'frozen':
        criterion.requires_grad_(False)
    if kind == 'evaluation':
        criterion.eval()
    if kind == 'no graph':
        model.requires_grad_(False)
    loss_of = (lambda losses: losses['task_loss']) if kind == 'no gradient' else (lambda losses: losses['loss'])
    assert not train(model, criterion, update_by(optimizer), loss_of=loss_of)
    assert messages('WARNING') == []


def test_copies_watch_for_themselves(messages):
    model, criterion = create_network(), SCLLoss(WIDTH)
    train(model, criterion, update_by(torch.optim.SGD(model.parameters(), lr=0.1)), 8)
    copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    for again in copies:
        train(model, again, update_by(torch.optim.SGD(model.parameters(), lr=0.1)), 8)
    assert messages('WARNING') == []
    train(model, copies[0], update_by(torch.optim.SGD(model.parameters(), lr=0.1)), 8)
    assert len(messages('WARNING')) == 1
