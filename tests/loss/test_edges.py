"""The whole objective at the edges of a batch, in half precision, and of rows that take no part"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from losses import (
    DEGENERATE_LABELS,
    WIDTH,
    assert_finite_and_bounded_gradient,
    assert_losses_agree,
    losses_and_reference,
    make_classifier,
    make_criterion,
)
from reference import generator, random_features, random_label, random_soft_target

from timm_coretune import CoreTuningLoss

# Values


@pytest.mark.parametrize('label', DEGENERATE_LABELS.values(), ids=DEGENERATE_LABELS)
@pytest.mark.parametrize('mixup_enabled', [True, False], ids=['mixtures', 'no mixtures'])
def test_degenerate_batches_agree_with_the_reference_and_have_a_gradient(label, mixup_enabled):
    criterion, target = make_criterion(contrast_weight=1.0), torch.tensor(label)
    criterion.mixup.mixup_enabled = mixup_enabled
    features = (random_features(3, len(label), WIDTH) * 0.2).requires_grad_()
    losses, expected = losses_and_reference(criterion, features, make_classifier(6), target)
    assert_losses_agree(losses, expected)
    assert_finite_and_bounded_gradient(losses['loss'], features, *criterion.parameters())


# Precision


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


def test_infinite_logits_are_not_masked():
    logits = random_features(18, 8, 3)
    logits[2, 1] = float('inf')
    assert make_criterion()(random_features(18, 8, WIDTH), logits, random_label(18, 8, 3)).isnan()


def mixed_logits_by_hand(criterion, features, logits, target):
    """Logits and soft targets of all rows that the criterion is about to make, where 0 * -inf is 0."""
    draws = copy.deepcopy(criterion.mixup).draw(len(logits))
    pairs = criterion.mixup.pair(features, target, draws)
    one_hot = F.one_hot(target, logits.shape[1]).double()
    rows, targets = list(logits), list(one_hot)
    for mixture in (pairs.positive, pairs.negative):
        for i, j, lam in zip(mixture.index, mixture.other, mixture.lam.double().tolist(), strict=True):
            rows.append(sum(share * logits[k] for share, k in ((lam, i), (1 - lam, j)) if share))
            targets.append(lam * one_hot[i] + (1 - lam) * one_hot[j])
    return rows, targets


def cross_entropy_by_hand(rows, targets):
    """Where a class without a share of the target costs nothing."""
    total = 0.0
    for row, target in zip(rows, targets, strict=True):
        log_p = row.log_softmax(dim=0).tolist()
        total -= sum(share * lp for share, lp in zip(target.tolist(), log_p, strict=True) if share)
    return total / len(rows)


@pytest.mark.parametrize('excluded', [[(slice(None), 3)], [(slice(None), 3), (slice(None), 4)]], ids=['one', 'two'])
@pytest.mark.parametrize('kind', ['indices', 'soft', 'float32'])
def test_a_class_that_is_excluded_by_minus_infinity_costs_nothing(kind, excluded):
    target = torch.tensor([0, 1, 0, 2, 1, 2, 0, 1])
    logits = random_features(18, 8, 5)
    for place in excluded:
        logits[place] = float('-inf')
    criterion = make_criterion(contrast_weight=0.0)
    features = logits.nan_to_num(neginf=0.0)[:, [0, 1, 2, 0, 1, 2]]
    expected = cross_entropy_by_hand(*mixed_logits_by_hand(criterion, features, logits, target))
    given = F.one_hot(target, 5).double() if kind == 'soft' else target
    logits = (logits.float() if kind == 'float32' else logits).requires_grad_()
    loss = criterion(features, logits, given)
    assert loss.item() == pytest.approx(expected, rel=1e-6 if kind == 'float32' else 1e-12)
    assert_finite_and_bounded_gradient(loss, logits)
    criterion.mixup.mixup_enabled = False
    clean = criterion(features, logits, given)
    torch.testing.assert_close(clean, F.cross_entropy(logits, target))


def test_a_mixture_excludes_what_one_of_its_rows_excludes_and_that_may_cost_infinitely():
    target = torch.tensor([0, 1, 0, 1])
    features, logits = random_features(3, 4, WIDTH), random_features(4, 4, 3)
    logits[0, 2] = float('-inf')  # no row is of class 2
    criterion = make_criterion(contrast_weight=0.0)
    expected = cross_entropy_by_hand(*mixed_logits_by_hand(criterion, features, logits, target))
    assert criterion(features, logits, target).item() == pytest.approx(expected, rel=1e-12)
    logits[0, 1] = float('-inf')  # row 0 is mixed with rows of class 1
    assert F.cross_entropy(logits, target).isfinite()
    assert criterion(features, logits, target) == float('inf')


def test_a_given_loss_counts_in_full_where_no_row_takes_part():
    criterion = make_criterion(double=False)
    features, logits = torch.randn(5, WIDTH), torch.randn(5, 4)
    for label, num_parts in (([-1] * 5, 1), ([-1, 2, 2, -1, -1], 2), ([0, -1, 2, -1, -1], 3)):
        described = criterion.prepare(5, features.device)
        given = [
            criterion.compute(features, logits, torch.tensor(label), *described, clean_loss=torch.tensor(clean))
            for clean in (1.0, 2.0)
        ]
        assert (given[1]['task_loss'] - given[0]['task_loss']).item() == pytest.approx(1 / num_parts, rel=1e-5)


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
