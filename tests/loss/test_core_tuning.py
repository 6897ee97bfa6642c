"""The whole objective: values and gradients against loops in float64, draws, errors"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import WIDTH, assert_losses_agree, losses_and_reference, make_classifier, make_criterion
from reference import random_features, random_label, random_soft_target

from timm_coretune import CoreTuningLoss, FocalSupConLoss

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
    smooth=st.sampled_from(['both', 'both', 'positive', 'negative', 'none']),
    smooth_weight=st.sampled_from([None, None, 0.3, 2.0]),
    mixtures=st.sampled_from(['both', 'both', 'positive', 'negative', 'none']),
    positive_candidates=st.sampled_from([0, 0, 1, 4]),
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
    smooth,
    smooth_weight,
    mixtures,
    positive_candidates,
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
        smooth=smooth,
        smooth_weight=smooth_weight,
        mixtures=mixtures,
        positive_candidates=positive_candidates,
    )
    criterion.mixup.mixup_enabled &= mixup_enabled
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
        {'smooth': 'negative', 'smooth_weight': 0.3},
        {'smooth': 'none', 'mixtures': 'positive'},
        {'smooth': 'none', 'mixtures': 'none'},
        {'positive_candidates': 4},
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


# Gradients


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


def test_descriptions_tell_the_arguments():
    assert repr(FocalSupConLoss(0.1, focal=False)) == 'FocalSupConLoss(temperature=0.1, focal=False)'
    description = repr(CoreTuningLoss(WIDTH, contrast_weight=0.5, label_smoothing=0.1))
    assert 'contrast_weight=0.5, label_smoothing=0.1, mixup=HardPairMixup(mixup_alpha=1.0' in description
