"""Protects values and gradients of the losses: against loops in float64, numerically, and at the edges of a batch"""

import copy
import math
from decimal import Decimal, getcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import SupConLoss
from reference import (
    array,
    classes,
    focal_contrast,
    layer_of,
    objective,
    random_features,
    random_label,
    random_soft_target,
)

from timm_coretune import CoreTuningLoss, FocalSupConLoss
from timm_coretune.mining import hard_label, normalize

WIDTH = 6

DEGENERATE_LABELS = {
    'one image': [0],
    'one class': [2] * 6,
    'a class alone': [0, 0, 1, 0, 0, 0],
    'two images of one class': [1, 1],
    'two images of two classes': [0, 1],
    'all different': [0, 1, 2, 3, 4, 5],
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def losses_and_reference(
    criterion: CoreTuningLoss, features: torch.Tensor, classifier: torch.nn.Linear, target: torch.Tensor
) -> tuple[dict, dict]:
    """Losses of a batch, and those of the reference with the random numbers that the criterion is about to draw."""
    drawn = {}
    if criterion.mixup.mixup_enabled:
        draws = copy.deepcopy(criterion.mixup).draw(len(features))
        pairs = criterion.mixup.pair(features, hard_label(target), draws)
        drawn = {
            'random_negative': pairs.negative.index.tolist(),
            'a': draws.positive_lam.double().tolist(),
            'b': draws.negative_lam.double().tolist(),
        }
    projector = criterion.projector and (layer_of(criterion.projector.fc1), layer_of(criterion.projector.fc2))
    expected = objective(
        features,
        target,
        layer_of(classifier),
        projector,
        **drawn,
        contrast_weight=criterion.contrast_weight,
        temperature=criterion.contrast.temperature,
        focal=criterion.contrast.focal,
        label_smoothing=criterion.label_smoothing,
    )
    return criterion.losses(features, classifier(features), target), expected


def assert_losses_agree(losses: dict, expected: dict) -> None:
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-10, abs=1e-12)


def assert_finite_and_bounded_gradient(loss: torch.Tensor, *inputs: torch.Tensor, bound: float = 1e4) -> None:
    assert torch.isfinite(loss)
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < bound


# Values


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 16),
    num_classes=st.integers(1, 7),
    imbalance=st.sampled_from([0.0, 1.0, 4.0]),
    soft=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    alpha=st.sampled_from([0.3, 1.0]),
    minima=st.sampled_from([(0.0, 0.8), (0.8, 0.0)]),
    temperature=st.sampled_from([0.07, 0.5]),
    contrast_weight=st.sampled_from([0.0, 0.1, 1.0]),
    focal=st.booleans(),
    mixup_enabled=st.sampled_from([True, True, True, False]),
)
def test_all_losses_of_any_batch_are_those_of_the_reference(
    seed,
    batch_size,
    num_classes,
    imbalance,
    soft,
    smoothing,
    alpha,
    minima,
    temperature,
    contrast_weight,
    focal,
    mixup_enabled,
):
    criterion = make_criterion(
        seed,
        contrast_weight=contrast_weight,
        mixup_alpha=alpha,
        temperature=temperature,
        label_smoothing=smoothing,
        min_positive_lam=minima[0],
        min_negative_lam=minima[1],
        focal=focal,
    )
    criterion.mixup.mixup_enabled = mixup_enabled
    target = (
        random_soft_target(seed, batch_size, num_classes)
        if soft
        else random_label(seed, batch_size, num_classes, imbalance)
    )
    features = random_features(seed, batch_size, WIDTH) * 0.2
    assert_losses_agree(*losses_and_reference(criterion, features, make_classifier(num_classes, seed), target))


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        {'label_smoothing': 0.2},
        {'contrast_weight': 1.0},
        {'contrast_weight': 0.0},
        {'temperature': 0.3},
        {'focal': False},
        {'min_positive_lam': 0.8},
        {'min_negative_lam': 0.0},
        {'mixup_alpha': 0.2},
    ],
    ids=lambda kwargs: ' '.join(f'{name} {value}' for name, value in kwargs.items()) or 'defaults',
)
@pytest.mark.parametrize('kind', ['indices', 'int32 indices', 'soft'])
def test_every_argument_means_what_the_reference_says(kind, kwargs):
    target = random_soft_target(1, 20, 5) if kind == 'soft' else random_label(1, 20, 5, imbalance=1.0)
    target = target.int() if kind == 'int32 indices' else target
    criterion, features = make_criterion(1, **kwargs), random_features(1, 20, WIDTH) * 0.2
    assert_losses_agree(*losses_and_reference(criterion, features, make_classifier(5), target))


def test_successive_steps_draw_anew_and_follow_the_reference():
    criterion, classifier = make_criterion(), make_classifier(4)
    features, target = random_features(2, 12, WIDTH) * 0.2, random_label(2, 12, 4)
    seen = []
    for _ in range(3):
        losses, expected = losses_and_reference(criterion, features, classifier, target)
        assert_losses_agree(losses, expected)
        seen.append(losses['loss'].item())
    assert len(set(seen)) == 3


@pytest.mark.parametrize('label', DEGENERATE_LABELS.values(), ids=DEGENERATE_LABELS)
@pytest.mark.parametrize('mixup_enabled', [True, False], ids=['mixtures', 'no mixtures'])
def test_degenerate_batches_agree_with_the_reference_and_have_a_gradient(label, mixup_enabled):
    criterion, target = make_criterion(contrast_weight=1.0), torch.tensor(label)
    criterion.mixup.mixup_enabled = mixup_enabled
    features = (random_features(3, len(label), WIDTH) * 0.2).requires_grad_()
    losses, expected = losses_and_reference(criterion, features, make_classifier(6), target)
    assert_losses_agree(losses, expected)
    assert_finite_and_bounded_gradient(losses['loss'], features, *criterion.parameters())


def test_a_weight_of_zero_builds_no_projector_and_reports_no_contrast():
    criterion = make_criterion(contrast_weight=0.0)
    features, target = random_features(0, 8, WIDTH) * 0.2, random_label(0, 8, 3)
    losses, expected = losses_and_reference(criterion, features, make_classifier(3), target)
    assert criterion.projector is None
    assert list(criterion.parameters()) == []
    assert set(losses) == {'loss', 'task_loss'}
    assert losses['loss'].item() == losses['task_loss'].item()
    assert_losses_agree(losses, expected)


def test_without_mixtures_and_contrast_it_is_the_cross_entropy_of_torch():
    criterion = make_criterion(contrast_weight=0.0, label_smoothing=0.1)
    criterion.mixup.mixup_enabled = False
    logits, target = random_features(0, 12, 7), random_label(0, 12, 7)
    loss = criterion(random_features(1, 12, WIDTH), logits, target)
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_forward_is_the_loss_of_losses():
    features, target, classifier = random_features(0, 8, WIDTH), random_label(0, 8, 3), make_classifier(3)
    loss = make_criterion()(features, classifier(features), target)
    assert loss.shape == ()
    assert torch.equal(loss, make_criterion().losses(features, classifier(features), target)['loss'])


def test_a_copy_of_the_loss_continues_with_the_same_draws():
    criterion, features, target = make_criterion(), random_features(0, 8, WIDTH), random_label(0, 8, 3)
    logits = make_classifier(3)(features)
    criterion(features, logits, target)
    copied = copy.deepcopy(criterion)
    assert torch.equal(copied(features, logits, target), criterion(features, logits, target))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 16),
    num_classes=st.integers(1, 8),
    imbalance=st.sampled_from([0.0, 3.0]),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    extras=st.sampled_from(['none', 'positive', 'negative', 'both']),
    focal=st.booleans(),
    soft=st.booleans(),
)
def test_the_contrastive_loss_is_that_of_the_reference(
    seed, batch_size, num_classes, imbalance, temperature, extras, focal, soft
):
    v, plus, minus = random_features(seed, 3 * batch_size, 5).split(batch_size)
    plus, minus = plus if extras in ('positive', 'both') else None, minus if extras in ('negative', 'both') else None
    target = (
        random_soft_target(seed, batch_size, num_classes)
        if soft
        else random_label(seed, batch_size, num_classes, imbalance)
    )
    loss = FocalSupConLoss(temperature, focal=focal)(v, target, extra_positive=plus, extra_negative=minus)
    expected = focal_contrast(
        array(v),
        classes(target),
        None if plus is None else array(plus),
        None if minus is None else array(minus),
        temperature=temperature,
        focal=focal,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_contrast_of_two_pairs_of_images_matches_a_calculation_by_hand():
    # orthogonal classes, cosines of 1 within and 0 across: p = e / (e + 2) at temperature 1
    embedding = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    p = math.e / (math.e + 2.0)
    label = torch.tensor([0, 0, 1, 1])
    assert FocalSupConLoss(1.0)(embedding, label).item() == pytest.approx(-(1.0 - p) * math.log(p), rel=1e-6)
    assert FocalSupConLoss(1.0, focal=False)(embedding, label).item() == pytest.approx(-math.log(p), rel=1e-6)


@pytest.mark.parametrize('temperature', [0.07, 0.5], ids=lambda temperature: f'temperature {temperature}')
@pytest.mark.parametrize('repeats', [[2, 2, 2], [5, 2, 9, 3]], ids=['balanced', 'imbalanced'])
def test_without_focal_factor_and_extras_it_is_the_supcon_of_pytorch_metric_learning(repeats, temperature):
    label = torch.arange(len(repeats)).repeat_interleave(torch.tensor(repeats))
    label = label[torch.randperm(len(label), generator=generator())]
    ours = random_features(4, len(label), 8).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss, expected = FocalSupConLoss(temperature, focal=False)(ours, label), SupConLoss(temperature)(theirs, label)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def exact_pair_loss(gap: float, others: int) -> float:
    """-(1 - p) ln p of the largest of `others` + 1 similarities that lies `gap` over the rest, in 60 digits."""
    getcontext().prec = 60
    p = 1 / (1 + others * (-Decimal(gap)).exp())
    return float(-(1 - p) * p.ln())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
def test_the_contrast_is_exact_near_p_of_one_up_to_the_rounding_of_log_p(dtype):
    # an anchor, its positive, two negatives: cosines 1, 0, 0
    embedding = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=dtype)
    label = torch.tensor([0, 0, 1, 1])
    eps = torch.finfo(dtype).eps
    for temperature in (0.25, 0.15, 0.1, 0.07):
        expected = exact_pair_loss(1.0 / temperature, others=2)
        loss = FocalSupConLoss(temperature)(embedding, label).item()
        log_p = expected**0.5  # near p = 1 the loss is the square of log p, whose rounding is of the order of eps
        assert loss > 0.0
        assert abs(loss - expected) <= 4 * eps * log_p + 4 * eps**2 + 1e-6 * expected


@pytest.mark.parametrize('temperature', [0.07, 0.01, 0.001], ids=lambda temperature: f'temperature {temperature}')
def test_the_gradient_vanishes_where_every_positive_is_certain(temperature):
    embedding = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    loss = FocalSupConLoss(temperature)(embedding, torch.tensor([0, 0, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, embedding)
    assert 0.0 <= loss < 1e-9
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() < 1e-4


# Gradients


@pytest.mark.parametrize('focal', [True, False], ids=['focal', 'not focal'])
@pytest.mark.parametrize('extras', [True, False], ids=['extras', 'no extras'])
def test_the_gradient_of_the_contrast_is_the_numerical_one(focal, extras):
    label = torch.tensor([0, 0, 1, 2, 1, 0])
    inputs = [x.clone().requires_grad_() for x in random_features(5, 18, 4).split(6)][: 3 if extras else 1]
    loss = FocalSupConLoss(0.5, focal=focal)
    assert torch.autograd.gradcheck(lambda v, *extra: loss(v, label, *extra), inputs)


@pytest.mark.parametrize('kind', ['indices', 'soft', 'one class'])
def test_the_gradient_of_the_whole_objective_is_the_numerical_one(kind):
    target = {
        'indices': torch.tensor([0, 0, 1, 2, 1, 0]),
        'soft': random_soft_target(8, 6, 3),
        'one class': torch.ones(6).long(),
    }[kind]
    criterion = make_criterion(6, projection_dim=4, contrast_weight=1.0, temperature=0.5, label_smoothing=0.1)
    features = random_features(6, 6, WIDTH).div(4).requires_grad_()
    logits = random_features(7, 6, 3).div(4).requires_grad_()
    prepared = criterion.prepare(6, features.device)

    def loss(features, logits, *_):  # gradcheck moves the parameters in place
        return criterion.compute(features, logits, target, *prepared)['loss']

    assert torch.autograd.gradcheck(loss, (features, logits, *criterion.projector.parameters()))


def test_both_terms_train_the_backbone_and_the_cross_entropy_spares_the_projector():
    criterion = make_criterion()
    features = random_features(0, 10, WIDTH).mul(0.2).requires_grad_()
    losses = criterion.losses(features, make_classifier(4)(features), random_label(0, 10, 4))
    for name in ('task_loss', 'contrast_loss'):
        (gradient,) = torch.autograd.grad(losses[name], features, retain_graph=True)
        assert (gradient.abs().sum(dim=1) > 0).all()
    of_projector = torch.autograd.grad(
        losses['task_loss'], list(criterion.parameters()), retain_graph=True, allow_unused=True
    )
    assert of_projector == (None,) * 4
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(losses['loss'], criterion.parameters()))


# Precision


@pytest.mark.parametrize('focal', [True, False], ids=['focal', 'not focal'])
def test_autocast_does_not_touch_the_contrast_of_given_embeddings(focal):
    v, plus, minus = random_features(9, 60, 16, torch.float32).split(20)
    label, loss = random_label(9, 20, 4), FocalSupConLoss(focal=focal)
    expected = loss(v, label, plus, minus)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = loss(v, label, plus, minus)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)


def test_autocast_leaves_cross_entropy_and_choice_of_pairs_alone():
    features, target = random_features(9, 20, WIDTH, torch.float32), random_label(9, 20, 4)
    logits = make_classifier(4).float()(features)
    expected = make_criterion(double=False).losses(features, logits, target)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = make_criterion(double=False).losses(features, logits, target)
    assert torch.equal(inside['task_loss'], expected['task_loss'])
    # only the projection head runs in bfloat16
    assert inside['contrast_loss'].dtype == torch.float32
    assert inside['contrast_loss'].item() == pytest.approx(expected['contrast_loss'].item(), rel=0.05)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
@pytest.mark.parametrize('soft', [True, False], ids=['soft', 'indices'])
def test_half_precision_inputs_give_finite_float32_losses_near_those_of_float32(dtype, soft):
    features = random_features(10, 24, WIDTH).mul(0.2).to(dtype).requires_grad_()
    logits = make_classifier(5)(features.detach().double()).to(dtype).requires_grad_()
    target = random_soft_target(10, 24, 5).to(dtype) if soft else random_label(10, 24, 5)
    losses = make_criterion(double=False).losses(features, logits, target)
    expected = make_criterion(double=False).losses(features.float(), logits.float(), target)
    assert {name: loss.dtype for name, loss in losses.items()} == dict.fromkeys(losses, torch.float32)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5)
    assert_finite_and_bounded_gradient(losses['loss'], features, logits)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_large_logits_do_not_overflow(dtype):
    features = random_features(10, 8, WIDTH, dtype).requires_grad_()
    logits = torch.zeros(8, 4, dtype=dtype).index_fill_(1, torch.tensor([2]), 3e4).requires_grad_()
    loss = make_criterion(double=False)(features, logits, random_label(10, 8, 4))
    assert loss > 1000.0
    assert_finite_and_bounded_gradient(loss, features, logits)


# Edges


@pytest.mark.parametrize('zero_rows', [[0], [1, 4], list(range(8))], ids=['one', 'two', 'all'])
def test_feature_rows_of_zeros_give_a_finite_loss_and_a_bounded_gradient(zero_rows):
    features = random_features(11, 8, WIDTH).mul(0.2)
    features[zero_rows] = 0.0
    features.requires_grad_()
    criterion, target = make_criterion(contrast_weight=1.0), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    loss = criterion(features, make_classifier(3)(features), target)
    assert_finite_and_bounded_gradient(loss, features, *criterion.parameters())


@pytest.mark.parametrize('zero_rows', [[0], [1, 4], list(range(6))], ids=['one', 'two', 'all'])
def test_embeddings_of_zeros_agree_with_the_reference_and_get_no_gradient(zero_rows):
    v, plus, minus = (x.clone() for x in random_features(12, 18, 4).split(6))
    v[zero_rows] = plus[zero_rows] = minus[zero_rows] = 0.0
    inputs = [x.requires_grad_() for x in (v, plus, minus)]
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = FocalSupConLoss()(v, label, plus, minus)
    assert loss.item() == pytest.approx(focal_contrast(array(v), label.tolist(), array(plus), array(minus)), rel=1e-10)
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e3
        assert gradient[zero_rows].eq(0).all()


def test_a_projector_that_maps_all_to_zero_gives_a_finite_loss():
    criterion = make_criterion(contrast_weight=1.0)
    torch.nn.init.zeros_(criterion.projector.fc2.weight)
    torch.nn.init.zeros_(criterion.projector.fc2.bias)
    features = random_features(11, 8, WIDTH).requires_grad_()
    loss = criterion(features, make_classifier(3)(features), random_label(11, 8, 3))
    assert_finite_and_bounded_gradient(loss, features, *criterion.parameters())


def test_duplicate_images_agree_with_the_reference():
    features = random_features(13, 4, WIDTH).mul(0.2).repeat(3, 1).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 0])
    criterion = make_criterion()
    losses, expected = losses_and_reference(criterion, features, make_classifier(4), target)
    assert_losses_agree(losses, expected)
    assert_finite_and_bounded_gradient(losses['loss'], features, *criterion.parameters())


@pytest.mark.parametrize('label', DEGENERATE_LABELS.values(), ids=DEGENERATE_LABELS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_degenerate_batches_train_in_every_precision(label, dtype):
    criterion = make_criterion(double=False, contrast_weight=1.0)
    features = random_features(3, len(label), WIDTH).mul(0.2).to(dtype).requires_grad_()
    logits = random_features(4, len(label), 6).mul(0.2).to(dtype).requires_grad_()
    loss = criterion(features, logits, torch.tensor(label))
    assert loss.dtype == torch.float32
    assert_finite_and_bounded_gradient(loss, features, logits, *criterion.parameters())


def test_five_thousand_classes_agree_with_the_reference():
    target = random_label(14, 24, 5000)
    target[:6] = torch.tensor([4999, 4999, 4998, 4998, 0, 0])
    features = random_features(14, 24, WIDTH) * 0.2
    assert_losses_agree(*losses_and_reference(make_criterion(), features, make_classifier(5000), target))


@pytest.mark.parametrize('soft', [True, False], ids=['soft', 'indices'])
def test_thirty_two_thousand_classes_train(soft):
    features = random_features(15, 32, WIDTH, torch.float32).mul(0.2).requires_grad_()
    logits = torch.randn(32, 32_000, generator=generator()).requires_grad_()
    target = torch.arange(32) * 1000 // 2000 * 2000
    target = torch.nn.functional.one_hot(target, 32_000).float() if soft else target
    criterion = make_criterion(double=False, label_smoothing=0.1)
    losses = criterion.losses(features, logits, target)
    assert losses['task_loss'].item() == pytest.approx(math.log(32_000) + 0.5, rel=0.1)
    assert_finite_and_bounded_gradient(losses['loss'], features, logits, *criterion.parameters())


@pytest.mark.parametrize('label', DEGENERATE_LABELS.values(), ids=DEGENERATE_LABELS)
@pytest.mark.parametrize('contrast_weight', [0.0, 0.1], ids=['no contrast', 'contrast'])
def test_nan_features_give_a_nan_loss(label, contrast_weight):
    criterion = make_criterion(contrast_weight=contrast_weight)
    features = random_features(16, len(label), WIDTH)
    features[-1, 2] = float('nan')
    losses = criterion.losses(features, make_classifier(6)(features), torch.tensor(label))
    assert all(loss.isnan() for loss in losses.values())


@pytest.mark.parametrize('label', DEGENERATE_LABELS.values(), ids=DEGENERATE_LABELS)
def test_nan_features_give_a_nan_loss_also_without_mixtures(label):
    criterion = make_criterion()
    criterion.mixup.mixup_enabled = False
    features = random_features(16, len(label), WIDTH)
    features[-1, 2] = float('nan')
    losses = criterion.losses(features, make_classifier(6)(features), torch.tensor(label))
    assert losses['loss'].isnan()
    assert losses['task_loss'].isnan()


@pytest.mark.parametrize('which', [0, 1, 2], ids=['embedding', 'extra positive', 'extra negative'])
def test_nan_embeddings_give_a_nan_contrast(which):
    inputs = [x.clone() for x in random_features(17, 18, 4).split(6)]
    inputs[which][3, 1] = float('nan')
    v, plus, minus = inputs
    assert FocalSupConLoss()(v, torch.tensor([0, 0, 1, 1, 2, 2]), plus, minus).isnan()


def test_infinite_logits_are_not_masked():
    logits = random_features(18, 8, 3)
    logits[2, 1] = float('inf')
    assert make_criterion()(random_features(18, 8, WIDTH), logits, random_label(18, 8, 3)).isnan()


def test_normalized_rows_have_length_one_or_zero():
    x = random_features(0, 10, 4, torch.bfloat16)
    x[3] = 0.0
    length = normalize(x).norm(dim=1)
    assert length.dtype == torch.float32
    torch.testing.assert_close(length, torch.ones(10).index_fill_(0, torch.tensor([3]), 0.0))


# Errors and descriptions


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'num_features': 0}, r'num_features and projection_dim >= 1, got 0 and 256.*model\.head_hidden_size'),
        ({'projection_dim': 0}, r'num_features and projection_dim >= 1, got 6 and 0'),
        ({'contrast_weight': -0.1}, r'contrast_weight >= 0, got -0\.1'),
        ({'contrast_weight': float('nan')}, r'contrast_weight >= 0, got nan'),
        ({'label_smoothing': 1.0}, r'label_smoothing in \[0, 1\), got 1\.0'),
        ({'label_smoothing': -0.1}, r'label_smoothing in \[0, 1\), got -0\.1'),
        ({'temperature': 0.0}, r'temperature > 0.*got 0\.0.*0\.07'),
        ({'temperature': float('nan')}, r'temperature > 0.*got nan'),
        ({'mixup_alpha': 0.0}, r'mixup_alpha > 0.*got 0\.0'),
        ({'min_positive_lam': 2.0}, r'min_positive_lam in \[0, 1\].*got 2\.0'),
        ({'min_negative_lam': -1.0}, r'min_negative_lam in \[0, 1\].*got -1\.0'),
    ],
    ids=lambda value: ' '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else '',
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CoreTuningLoss(**{'num_features': WIDTH, **kwargs})


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan')])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=r'Expected temperature > 0'):
        FocalSupConLoss(temperature)


@pytest.mark.parametrize(
    'features, logits, target, message',
    [
        (torch.ones(4, 6, 2, 2), torch.ones(4, 3), torch.zeros(4).long(), r'\(batch_size, width\) .*forward_head'),
        (torch.ones(4, 6).long(), torch.ones(4, 3), torch.zeros(4).long(), r'matrix, got torch\.int64'),
        (torch.ones(4, 5), torch.ones(4, 3), torch.zeros(4).long(), r'\(batch_size, 6\), got \(4, 5\).*num_features=5'),
        (torch.ones(4, 6), torch.ones(5, 3), torch.zeros(4).long(), r'logits \(4, num_classes\).*got .* \(5, 3\)'),
        (torch.ones(4, 6), torch.ones(4), torch.zeros(4).long(), r'logits \(4, num_classes\).*got .* \(4,\)'),
        (torch.ones(4, 6), torch.ones(4, 3).long(), torch.zeros(4).long(), r'floating-point logits.*torch\.int64'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.zeros(3).long(), r'class indices \(4,\).*got \(3,\).*same batch'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.zeros(3, 3), r'soft targets \(4, num_classes\).*got \(3, 3\)'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.ones(4, 5), r'soft targets \(4, 3\).*3 classes.*num_classes=5'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.ones(4, 3).long(), r'soft targets of a floating-point dtype.*int64'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.zeros(4), r'integer dtype, got torch\.float32.*target\.long\(\)'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.ones(4).bool(), r'integer dtype, got torch\.bool'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.ones(4).cfloat(), r'integer dtype, got torch\.complex64'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.tensor([0, 1, 2, 3]), r'in \[0, 2\], got 0 to 3.*num_classes'),
        (torch.ones(4, 6), torch.ones(4, 3), torch.tensor([0, 1, 2, -1]), r'in \[0, 2\], got -1 to 2.*start at 0'),
        (torch.ones(4, 6), torch.ones(4), None, r'CoreTuningTask'),
    ],
    ids=[
        'feature map',
        'integer features',
        'other width',
        'logits of another batch',
        'logits of one dimension',
        'integer logits',
        'target of another batch',
        'soft target of another batch',
        'soft target of other classes',
        'integer one-hot',
        'float class indices',
        'bool class indices',
        'complex class indices',
        'label too large',
        'negative label',
        'no target',
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_the_fix(features, logits, target, message):
    with pytest.raises(ValueError, match=message):
        make_criterion(double=False)(features, logits, target)


@pytest.mark.parametrize(
    'args, message',
    [
        ((torch.ones(4, 3, 2), torch.zeros(4).long()), r'Expected embedding as a floating-point'),
        ((torch.ones(4, 3), torch.zeros(3).long()), r'class indices \(4,\)'),
        ((torch.ones(4, 3), torch.zeros(4)), r'integer dtype'),
        ((torch.ones(4, 3), torch.tensor([0, -1, 0, 0])), r'non-negative, got -1 to 0'),
        ((torch.ones(4, 3), torch.zeros(4).long(), torch.ones(3, 3)), r'extra_positive \(4, 3\).*got \(3, 3\)'),
        ((torch.ones(4, 3), torch.zeros(4).long(), None, torch.ones(4, 2)), r'extra_negative \(4, 3\).*got \(4, 2\)'),
    ],
    ids=['sequence', 'mismatched batch', 'float label', 'negative label', 'extra positive', 'extra negative'],
)
def test_embeddings_that_do_not_fit_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        FocalSupConLoss()(*args)


def test_descriptions_tell_the_arguments():
    assert repr(FocalSupConLoss(0.1, focal=False)) == 'FocalSupConLoss(temperature=0.1, focal=False)'
    description = repr(CoreTuningLoss(WIDTH, contrast_weight=0.5, label_smoothing=0.1))
    assert 'contrast_weight=0.5, label_smoothing=0.1, mixup=HardPairMixup(mixup_alpha=1.0' in description


# rows that take no part


def _with_rows_left_out(rows, filler, at):
    """rows (M, ...) with rows of filler in between, so that at is True where rows are."""
    whole = filler.clone()
    whole[at] = rows
    return whole


@pytest.mark.parametrize('num_classes', [1, 3], ids=['one-class', 'three-classes'])
@pytest.mark.parametrize('mixup_enabled', [True, False], ids=['mixtures', 'clean'])
@pytest.mark.parametrize('at', [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 0, 0]], ids=str)
def test_rows_of_a_negative_label_are_as_if_they_were_not_there(num_classes, mixup_enabled, at):
    at = torch.tensor(at).bool()
    size, num_rows = int(at.sum()), len(at)
    criterion = CoreTuningLoss(6, contrast_weight=0.7, label_smoothing=0.1).double()
    criterion.mixup.mixup_enabled = mixup_enabled
    label = torch.randint(num_classes, (size,))
    features, logits = torch.randn(size, 6).double(), torch.randn(size, 4).double()
    batch, draws = criterion.prepare(size, torch.device('cpu'))
    whole_batch, whole_draws = criterion.prepare(num_rows, torch.device('cpu'))
    if draws is not None:
        whole_draws = type(draws)(*(_with_rows_left_out(a, b, at) for a, b in zip(draws, whole_draws, strict=True)))
    gradients = []
    for left_out in (False, True):
        f, o, y, described = features.clone(), logits.clone(), label, (batch, draws)
        if left_out:
            f = _with_rows_left_out(f, 100 * torch.randn(num_rows, 6).double(), at)
            o = _with_rows_left_out(o, 100 * torch.randn(num_rows, 4).double(), at)
            y, described = _with_rows_left_out(y, torch.full((num_rows,), -1), at), (whole_batch, whole_draws)
        f.requires_grad_()
        o.requires_grad_()
        criterion.zero_grad()
        losses = criterion.compute(f, o, y, *described)
        losses['loss'].backward()
        grads = [f.grad, o.grad, *(p.grad for p in criterion.parameters())]
        if left_out:
            assert all((grad[~at] == 0).all() for grad in grads[:2])
            grads[:2] = [grad[at] for grad in grads[:2]]
        gradients.append([*losses.values(), *grads])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)


def test_a_batch_of_which_nothing_takes_part_has_no_loss_and_no_gradient():
    criterion = CoreTuningLoss(6)
    features, logits = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for criterion.mixup.mixup_enabled in (True, False):
        described = criterion.prepare(5, features.device)
        losses = criterion.compute(features, logits, torch.full((5,), -1), *described)
        losses['loss'].backward()
        assert all(loss == 0 for loss in losses.values())
        assert not features.grad.any()
        assert not logits.grad.any()


def test_a_given_loss_of_the_clean_batch_stands_for_its_rows():
    criterion = CoreTuningLoss(6)
    features, logits, label = torch.randn(5, 6), torch.randn(5, 4), torch.tensor([0, 1, 0, 2, 2])
    described = criterion.prepare(5, features.device)
    clean = F.cross_entropy(logits, label)
    expected = criterion.compute(features, logits, label, *described)
    given = criterion.compute(features, logits, label, *described, clean_loss=clean)
    other = criterion.compute(features, logits, label, *described, clean_loss=clean + 3)
    torch.testing.assert_close(given, expected)
    assert other['task_loss'].item() == pytest.approx(expected['task_loss'].item() + 1)  # a third of 3
    torch.testing.assert_close(other['contrast_loss'], expected['contrast_loss'])
