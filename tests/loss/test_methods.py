"""What every method must pass: a method that is added to METHODS is tested here without a further line

It needs its reference in tests/helpers/methods/, and arguments in method_runs.py if its own do not fit small batches.
"""

import pytest
import torch
from method_runs import BATCH_SIZE, NUM_CLASSES, NUM_UPDATES, batches, create_run
from methods import Step, expected_losses
from reference import random_soft_target

from timm_coretune.loss import METHODS

TARGETS = {
    'classes': torch.tensor([0, 1, 0, 2, 1, 0, 0, 2]),
    'a class alone': torch.tensor([0, 0, 0, 1, 0, 0]),
    'one class': torch.tensor([2, 2, 2, 2]),
    'one image': torch.tensor([1]),
    'soft': random_soft_target(0, BATCH_SIZE, NUM_CLASSES),
}
every_method = pytest.mark.parametrize('method', METHODS)


def assert_same_state(state, expected, **tolerance):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=lambda text, name=name: f'{name}: {text}', **tolerance)


def images_for(target):
    generator = torch.Generator().manual_seed(len(target))
    return torch.randn(len(target), 3, 32, 32, generator=generator, dtype=torch.float64)


def step_of(run, input, target, pretrained, num_done):
    """What the reference needs to know, before the task computes its loss."""
    model = run.task.get_eval_model()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(input), pre_logits=True)
        logits = model.get_classifier()(features)
    return Step(run.task.criterion, model, pretrained, num_done, NUM_UPDATES, input, features, logits, target)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('num_done', [0, 3])
@every_method
def test_the_losses_are_those_of_plain_loops(method, num_done, smoothing):
    run = create_run(method, dtype=torch.float64, label_smoothing=smoothing)
    pretrained = {name: p.detach().clone() for name, p in run.task.get_eval_model().named_parameters()}
    for batch in batches(dtype=torch.float64)[:num_done]:
        run.update(batch)
    for kind, target in TARGETS.items():
        input = images_for(target)
        expected = expected_losses(method, step_of(run, input, target, pretrained, num_done))
        result = run.task(input, target)
        found = {name: value.item() for name, value in result.items() if name.endswith('loss')}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), kind
        run.optimizer.zero_grad()
        result['loss'].backward()
        for name, p in run.task.get_trainable_module().named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f'{name} has no gradient, which stalls DistributedDataParallel'
                assert torch.isfinite(p.grad).all(), (kind, name)
