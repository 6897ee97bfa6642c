"""Selective projection decay corrects the updates of any optimizer as the formula says"""

import math

import pytest
import torch
from accelerate import Accelerator
from method_runs import create_model
from timm.optim import create_optimizer_v2

from timm_coretune.loss import SPDLoss

NUM_STEPS = 6


def create(name, weight, dtype=torch.float64, wrap=lambda optimizer: optimizer):
    """A model, its optimizer, and the same again without the correction."""
    found = []
    for _ in range(2):
        model = create_model(dtype=dtype)
        optimizer = create_optimizer_v2(model.parameters(), opt=name, lr=0.05, momentum=0.9, weight_decay=0.0)
        found += [model, optimizer]
    criterion = SPDLoss(16, weight=weight)
    criterion.attach(found[0])
    criterion.attach_optimizer(wrap(found[1]), found[0])
    return found


def set_gradients(model, step):
    """Gradients that often lead back, as they belong to a bowl around other weights, and the noise is large."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = (p.detach() + torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)) / 10


def corrected(now, before, start, gradient, weight):
    """The formula of the paper for one tensor, in lists of numbers. Second: whether anything was taken back."""
    change = [a - b for a, b in zip(now, start, strict=True)]
    old_change = [a - b for a, b in zip(before, start, strict=True)]
    if not sum(g * c for g, c in zip(gradient, old_change, strict=True)) > 0:
        return now, False
    distance, old_distance = (math.sqrt(sum(c * c for c in x)) for x in (change, old_change))
    ratio = max(0.0, (distance - old_distance) / distance)
    return [a - weight * ratio * c for a, c in zip(now, change, strict=True)], ratio > 0


def numbers(x):
    return x.detach().double().flatten().tolist()


@pytest.mark.parametrize(
    'name, weight', [('sgd', 1.0), ('sgd', 0.3), ('momentum', 1.0), ('adamw', 1.0), ('lamb', 0.3), ('lion', 1.0)]
)
def test_updates_are_those_of_the_optimizer_and_the_formula(name, weight):
    model, optimizer, plain, plain_optimizer = create(name, weight)
    start = {key: numbers(p) for key, p in model.named_parameters()}
    num_corrected = num_left = 0
    for step in range(NUM_STEPS):
        with torch.no_grad():
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        before = {key: numbers(p) for key, p in plain.named_parameters()}
        set_gradients(model, step)
        set_gradients(plain, step)
        optimizer.step()
        plain_optimizer.step()
        found = dict(model.named_parameters())
        for key, p in plain.named_parameters():
            expected, is_corrected = numbers(p), False
            if not key.startswith('head.'):
                expected, is_corrected = corrected(expected, before[key], start[key], numbers(p.grad), weight)
            assert numbers(found[key]) == pytest.approx(expected, rel=1e-9, abs=1e-12), (step, key)
            num_corrected += is_corrected
            num_left += not is_corrected
    assert num_corrected > 5
    assert num_left > 5


def test_with_weight_1_no_tensor_moves_away_against_its_gradient():
    model, optimizer, *_ = create('adamw', 1.0)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    for step in range(NUM_STEPS):
        set_gradients(model, step)
        before = {key: p.detach() - start[key] for key, p in model.named_parameters()}
        optimizer.step()
        for key, p in model.named_parameters():
            if not key.startswith('head.') and (p.grad * before[key]).sum() > 0:
                assert (p - start[key]).norm() <= before[key].norm() * (1 + 1e-9)


def test_inside_lookahead_the_updates_of_its_optimizer_are_corrected():
    model, optimizer, alone, alone_optimizer = create('lookahead_adamw', 1.0)
    criterion = SPDLoss(16)
    criterion.attach(alone)
    criterion.attach_optimizer(alone_optimizer._base_optimizer, alone)
    plain = create('lookahead_adamw', 1.0)[2:]
    for step in range(NUM_STEPS):
        for m, o in ((model, optimizer), (alone, alone_optimizer), plain):
            set_gradients(m, step)
            o.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any(not torch.equal(p, r) for p, r in zip(model.parameters(), plain[0].parameters(), strict=True))


def test_accelerate_calls_the_hooks():
    model, optimizer, other, other_optimizer = create('sgd', 1.0)
    criterion = SPDLoss(16)
    criterion.attach(other)
    prepared = Accelerator(cpu=True).prepare(other_optimizer)
    criterion.attach_optimizer(prepared, other)
    for step in range(NUM_STEPS):
        set_gradients(model, step)
        set_gradients(other, step)
        optimizer.step()
        prepared.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_half_precision_measures_distances_in_float32():
    model, optimizer, plain, plain_optimizer = create('sgd', 1.0, torch.bfloat16)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    for step in range(NUM_STEPS):
        set_gradients(model, step)
        set_gradients(plain, step)
        optimizer.step()
        plain_optimizer.step()
    distances = [
        sum((p.double() - start[key].double()).square().sum() for key, p in m.named_parameters())
        for m in (model, plain)
    ]
    assert distances[0] < 0.95 * distances[1]


def test_weights_without_gradient_are_left_alone():
    model, optimizer, *_ = create('sgd', 1.0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for step in range(3):
        set_gradients(model, step)
        for key, p in model.named_parameters():
            if key.startswith('blocks.'):
                p.grad = None
        optimizer.step()
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) == key.startswith('blocks.'), key
    model.zero_grad()
    optimizer.step()


def test_what_is_missing_is_named():
    criterion, model = SPDLoss(16), create_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r'Expected criterion.attach\(model\) before the first step of SPDLoss'):
        criterion.attach_optimizer(optimizer, model)
    criterion.attach(model)
    with pytest.raises(RuntimeError, match='Call attach_optimizer of the task or the loss before the first step'):
        criterion(torch.randn(2, 16), torch.randn(2, 3), torch.tensor([0, 1]))

    class Unhooked(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{'params': list(parameters)}]

        def step(self):
            pass

    with pytest.raises(ValueError, match='whose step calls its hooks.*got Unhooked'):
        criterion.attach_optimizer(Unhooked(model.parameters()), model)
    with pytest.raises(ValueError, match='weight >= 0, got -1'):
        SPDLoss(16, weight=-1.0)
