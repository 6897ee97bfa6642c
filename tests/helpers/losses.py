"""A small loss, and what the reference says of it"""

import copy

import pytest
import torch
from reference import generator, layer_of, objective

from timm_coretune import CoreTuningLoss
from timm_coretune.mining import hard_label
from timm_coretune.mixup import MixupDraws

WIDTH = 6
NAMES = {'both': ('positive', 'negative'), 'positive': ('positive',), 'negative': ('negative',), 'none': ()}

DEGENERATE_LABELS = {
    'one image': [0],
    'one class': [2] * 6,
    'a class alone': [0, 0, 1, 0, 0, 0],
    'two images of one class': [1, 1],
    'two images of two classes': [0, 1],
    'all different': [0, 1, 2, 3, 4, 5],
}


def make_criterion(seed: int = 0, projection_dim: int = 5, double: bool = True, **kwargs) -> CoreTuningLoss:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        criterion = CoreTuningLoss(WIDTH, projection_dim=projection_dim, generator=generator(seed), **kwargs)
    return criterion.double() if double else criterion


def make_classifier(num_classes: int, seed: int = 0, width: int = WIDTH) -> torch.nn.Linear:
    classifier = torch.nn.Linear(width, num_classes, dtype=torch.float64)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator(seed)))
    return classifier


def drawn_numbers(criterion: CoreTuningLoss, features: torch.Tensor, label: torch.Tensor, draws: MixupDraws) -> dict:
    """The draws of a batch as the reference takes them."""
    drawn = {
        'random_negative': criterion.mixup.pair(features, label, draws).negative.index.tolist(),
        'a': draws.positive_lam.double().tolist(),
        'b': draws.negative_lam.double().tolist(),
    }
    if criterion.mixup.positive_candidates:
        drawn['candidates'] = draws.positive_candidates.tolist()
    return drawn


def settings_of(criterion: CoreTuningLoss) -> dict:
    """The settings of a loss as the reference takes them."""
    return {
        'contrast_weight': criterion.contrast_weight,
        'temperature': criterion.contrast.temperature,
        'focal': criterion.contrast.focal,
        'label_smoothing': criterion.label_smoothing,
        'smooth': NAMES[criterion.smooth],
        'smooth_weight': criterion.smooth_weight,
        'contrasted': NAMES[criterion.mixtures],
    }


def losses_and_reference(
    criterion: CoreTuningLoss, features: torch.Tensor, classifier: torch.nn.Linear, target: torch.Tensor
) -> tuple[dict, dict]:
    """Losses of a batch, and those of the reference with the random numbers that the criterion is about to draw."""
    drawn = {}
    if criterion.mixup.mixup_enabled:
        draws = copy.deepcopy(criterion.mixup).draw(len(features))
        drawn = drawn_numbers(criterion, features, hard_label(target), draws)
    projector = criterion.projector and (layer_of(criterion.projector.fc1), layer_of(criterion.projector.fc2))
    expected = objective(features, target, layer_of(classifier), projector, **drawn, **settings_of(criterion))
    return criterion.losses(features, classifier(features), target), expected


def assert_losses_agree(losses: dict, expected: dict) -> None:
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-10, abs=1e-12)


def assert_finite_and_bounded_gradient(loss: torch.Tensor, *inputs: torch.Tensor, bound: float = 1e4) -> None:
    assert torch.isfinite(loss)
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < bound
