"""Protects the mixtures of features and targets, their gradient, and the law of the random shares"""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    array,
    generator,
    mine,
    mixtures,
    random_features,
    random_label,
    random_soft_target,
    similarity,
    soft_target,
)

from timm_coretune import HardPairMixup
from timm_coretune.mining import hard_label
from timm_coretune.mixup import HardMixtures, Mixture, MixupDraws, sample_beta

NUM_CLASSES = 6


def mixup_and_its_draws(batch_size: int, seed: int = 0, **kwargs) -> tuple[HardPairMixup, MixupDraws]:
    """A HardPairMixup, and the draws that its next call will make."""
    twin = HardPairMixup(generator=generator(seed), num_classes=NUM_CLASSES, **kwargs)
    mixup = HardPairMixup(generator=generator(seed), num_classes=NUM_CLASSES, **kwargs)
    return mixup, twin.draw(batch_size)


def expected_parts(x: torch.Tensor, target: torch.Tensor, pairs: HardMixtures, draws: MixupDraws):
    """Clean rows, positive and negative mixtures of features and of targets by the reference's loops."""
    mined, rn = mine(x, target), pairs.negative.index.tolist()
    a, b = draws.positive_lam.double().tolist(), draws.negative_lam.double().tolist()
    f, t = list(array(x)), soft_target(target, NUM_CLASSES)
    mixed_f, mixed_t = mixtures(f, mined, rn, a, b), mixtures(t, mined, rn, a, b)
    # of a batch of one class the third part is documented as the clean rows
    return (
        torch.tensor([*map(list, f), *map(list, mixed_f.positive), *map(list, mixed_f.negative or f)]).double(),
        torch.tensor([*map(list, t), *map(list, mixed_t.positive), *map(list, mixed_t.negative or t)]).double(),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 20),
    num_classes=st.integers(1, NUM_CLASSES),
    imbalance=st.sampled_from([0.0, 3.0]),
    alpha=st.sampled_from([0.2, 1.0, 4.0]),
    soft=st.booleans(),
)
def test_mixed_features_and_targets_are_those_of_the_reference(seed, batch_size, num_classes, imbalance, alpha, soft):
    x = random_features(seed, batch_size, 5)
    target = (
        random_soft_target(seed, batch_size, NUM_CLASSES)
        if soft
        else random_label(seed, batch_size, num_classes, imbalance)
    )
    mixup, draws = mixup_and_its_draws(batch_size, seed, mixup_alpha=alpha)
    pairs = mixup.pair(x, hard_label(target), draws)
    mixed_x, mixed_target = mixup(x, target)
    expected_x, expected_target = expected_parts(x, target, pairs, draws)
    torch.testing.assert_close(mixed_x, expected_x, rtol=1e-12, atol=1e-12)
    # class indices become float32 targets
    tolerance = 1e-12 if soft else 1e-6
    torch.testing.assert_close(mixed_target.double(), expected_target, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mixed_target.sum(dim=1), torch.ones_like(mixed_target[:, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'dtype, tolerance',
    [(torch.float16, 1e-2), (torch.bfloat16, 6e-2), (torch.float32, 1e-5)],
    ids=['float16', 'bfloat16', 'float32'],
)
def test_features_keep_their_dtype_and_targets_are_float32(dtype, tolerance):
    x, label = random_features(0, 16, 5).clamp(-8, 8).to(dtype), random_label(0, 16, NUM_CLASSES)
    mixup, draws = mixup_and_its_draws(16)
    mixed_x, mixed_target = mixup(x, label)
    expected_x, expected_target = expected_parts(x, label, mixup.pair(x, label, draws), draws)
    assert (mixed_x.dtype, mixed_target.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(mixed_x.double(), expected_x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mixed_target.double(), expected_target, rtol=1e-6, atol=1e-6)


def test_class_indices_equal_one_hot_targets():
    x, label = random_features(0, 16, 5), random_label(0, 16, NUM_CLASSES)
    one_hot = torch.nn.functional.one_hot(label, NUM_CLASSES).float()
    by_index, by_soft = mixup_and_its_draws(16)[0](x, label), mixup_and_its_draws(16)[0](x, one_hot)
    assert torch.equal(by_index[0], by_soft[0])
    assert torch.equal(by_index[1], by_soft[1])


def test_the_share_of_a_positive_weighs_the_hardest_positive_and_of_a_negative_the_random_negative():
    x, label = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    draws = MixupDraws(torch.full((3,), 0.75), torch.full((3,), 0.9), torch.zeros(3), torch.zeros(3, 0))
    pairs = HardPairMixup().pair(x, label, draws)
    # of anchor 0 the only positive is 1 and the only negative is 2
    torch.testing.assert_close(pairs.positive.mix(x)[0], 0.75 * x[1] + 0.25 * x[2])
    torch.testing.assert_close(pairs.negative.mix(x)[0], 0.9 * x[2] + 0.1 * x[0])


@pytest.mark.parametrize('label', [[0], [3, 3, 3, 3]], ids=['one image', 'one class'])
def test_without_other_classes_positives_are_pure_and_negatives_repeat_the_clean_rows(label):
    label = torch.tensor(label)
    x = random_features(0, len(label), 5)
    mixed_x, mixed_target = mixup_and_its_draws(len(label))[0](x, label)
    clean, positive, negative = mixed_x.chunk(3)
    s = torch.from_numpy(similarity(x)).fill_diagonal_(2.0 if len(label) > 1 else -2.0)
    assert torch.equal(clean, x)
    torch.testing.assert_close(positive, x[s.argmin(dim=1)], rtol=1e-12, atol=0)
    torch.testing.assert_close(negative, x, rtol=1e-6, atol=0)
    assert (mixed_target.argmax(dim=1) == label[0]).all()
    torch.testing.assert_close(mixed_target.amax(dim=1), torch.ones(3 * len(label)))


def test_gradient_flows_through_both_parts_of_both_mixtures():
    batch_size = 9
    x = random_features(1, batch_size, 4).requires_grad_()
    label = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 5])
    mixup, draws = mixup_and_its_draws(batch_size)
    pairs, mined = mixup.pair(x, label, draws), mine(x, label)
    mixed_x, _ = mixup(x, label)
    weight = torch.randn(mixed_x.shape, generator=generator(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * mixed_x).sum(), x)
    by_hand = weight[:batch_size].clone()
    for i, (hp, hn, _) in enumerate(mined):
        a, b, rn = float(draws.positive_lam[i]), float(draws.negative_lam[i]), int(pairs.negative.index[i])
        by_hand[hp] += a * weight[batch_size + i]
        by_hand[hn] += (1.0 - a) * weight[batch_size + i]
        by_hand[rn] += b * weight[2 * batch_size + i]
        by_hand[i] += (1.0 - b) * weight[2 * batch_size + i]
    torch.testing.assert_close(gradient, by_hand, rtol=1e-12, atol=1e-12)


def test_a_mixture_mixes_rows_of_any_number_of_dimensions():
    mixture = Mixture(torch.tensor([2, 0]), torch.tensor([1, 1]), torch.tensor([0.25, 1.0]))
    x = torch.randn(3, 4, 2, 2, generator=generator())
    torch.testing.assert_close(mixture.mix(x), torch.stack([0.25 * x[2] + 0.75 * x[1], x[0]]))
    torch.testing.assert_close(mixture.mix(x[:, 0, 0, 0]), torch.stack([0.25 * x[2] + 0.75 * x[1], x[0]])[:, 0, 0, 0])


@pytest.mark.parametrize('minimum', [0.0, 0.3, 0.8, 1.0], ids=lambda m: f'min {m}')
def test_min_positive_lam_rescales_and_does_not_clip(minimum):
    draws = HardPairMixup(min_positive_lam=minimum, generator=generator()).draw(1000)
    plain = HardPairMixup(min_positive_lam=0.0, generator=generator()).draw(1000)
    torch.testing.assert_close(draws.positive_lam, minimum + (1.0 - minimum) * plain.positive_lam)
    assert draws.positive_lam.min() >= minimum
    assert draws.positive_lam.max() <= 1.0
    assert torch.equal(draws.negative_lam, plain.negative_lam)


@pytest.mark.parametrize('minimum', [0.0, 0.3, 0.8, 1.0], ids=lambda m: f'min {m}')
def test_min_negative_lam_clips_and_does_not_rescale(minimum):
    draws = HardPairMixup(min_negative_lam=minimum, generator=generator()).draw(1000)
    plain = HardPairMixup(min_negative_lam=0.0, generator=generator()).draw(1000)
    assert draws.negative_lam.tolist() == [max(lam, draws.negative_lam.new_tensor(minimum).item()) for lam in plain[1]]
    assert torch.equal(draws.positive_lam, plain.positive_lam)


def test_defaults_are_those_of_the_paper():
    mixup = HardPairMixup()
    assert (mixup.mixup_alpha, mixup.min_positive_lam, mixup.min_negative_lam) == (1.0, 0.0, 0.8)
    assert mixup.mixup_enabled


def test_mixup_enabled_false_returns_the_clean_rows_and_draws_nothing():
    x, label = random_features(0, 8, 5), random_label(0, 8, NUM_CLASSES)
    mixup = HardPairMixup(num_classes=NUM_CLASSES, generator=generator())
    state = mixup.generator.get_state()
    mixup.mixup_enabled = False
    clean, target = mixup(x, label)
    assert torch.equal(clean, x)
    assert target.tolist() == torch.nn.functional.one_hot(label, NUM_CLASSES).tolist()
    assert torch.equal(mixup.generator.get_state(), state)


@pytest.mark.parametrize('alpha', [1e-3, 0.2, 1.0, 4.0], ids=lambda alpha: f'alpha {alpha}')
def test_sample_beta_has_mean_and_variance_of_the_closed_form(alpha):
    n = 100_000
    draws = sample_beta(alpha, n, generator(1)).double()
    variance = 1.0 / (4.0 * (2.0 * alpha + 1.0))
    assert draws.shape == (n,)
    assert draws.min() >= 0.0
    assert draws.max() <= 1.0
    assert abs(draws.mean().item() - 0.5) < 5.0 * (variance / n) ** 0.5
    # |x - 1/2| <= 1/2, so the fourth central moment is at most a quarter of the variance
    assert abs(draws.var().item() - variance) < 5.0 * (variance / 4.0 / n) ** 0.5


def test_sample_beta_of_alpha_one_is_uniform():
    draws = sample_beta(1.0, 100_000, generator(1))
    counts = torch.histc(draws, bins=20, min=0.0, max=1.0)
    assert ((counts - 5000) ** 2 / 5000).sum() < 50.8  # 19 degrees of freedom, p > 1e-4


@pytest.mark.parametrize('alpha', [1e-3, 1e-2, 1e3], ids=lambda alpha: f'alpha {alpha}')
def test_sample_beta_is_finite_and_in_range_at_extreme_alpha(alpha):
    draws = sample_beta(alpha, 50_000, generator(1))
    assert draws.dtype == torch.float32
    assert torch.isfinite(draws).all()
    assert ((draws >= 0.0) & (draws <= 1.0)).all()


@pytest.mark.parametrize('alpha', [0.2, 1.0, 4.0], ids=lambda alpha: f'alpha {alpha}')
def test_sample_beta_repeats_from_a_restored_generator_state(alpha):
    source = generator(3)
    sample_beta(alpha, 10, source)
    state = source.get_state()
    first, following = sample_beta(alpha, 50, source), sample_beta(alpha, 50, source)
    source.set_state(state)
    assert torch.equal(sample_beta(alpha, 50, source), first)
    assert torch.equal(sample_beta(alpha, 50, source), following)
    assert not torch.equal(first, following)


@pytest.mark.parametrize('alpha', [0.2, 1.0], ids=lambda alpha: f'alpha {alpha}')
def test_reseeding_repeats_all_draws_and_they_are_independent(alpha):
    mixup = HardPairMixup(alpha, min_negative_lam=0.0, generator=generator(9), positive_candidates=1)
    first, second = mixup.draw(500), mixup.draw(500)
    mixup.generator.manual_seed(9)
    again = mixup.draw(500)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    columns = torch.stack([draw.flatten() for draw in (*first, *second)])
    correlation = torch.corrcoef(columns).fill_diagonal_(0.0)
    assert correlation.abs().max() < 5.0 / 500**0.5


def test_the_generator_of_the_object_follows_the_global_seed_and_leaves_the_global_stream_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        first = HardPairMixup()
        state = torch.get_rng_state()
        drawn = first.draw(20)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(21)
        assert torch.equal(HardPairMixup().draw(20).positive_lam, drawn.positive_lam)
        torch.manual_seed(22)
        assert not torch.equal(HardPairMixup().draw(20).positive_lam, drawn.positive_lam)


@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda mixup: pickle.loads(pickle.dumps(mixup))], ids=['deepcopy', 'pickle']
)
def test_a_copy_continues_the_same_draws_on_a_generator_of_its_own(duplicate):
    mixup = HardPairMixup(0.5, 0.1, 0.7, generator=generator(4), num_classes=3)
    mixup.draw(10)
    mixup.mixup_enabled = False
    copied = duplicate(mixup)
    assert copied.generator is not mixup.generator
    assert repr(copied) == repr(mixup)
    assert (copied.num_classes, copied.mixup_enabled) == (3, False)
    assert all(torch.equal(left, right) for left, right in zip(copied.draw(10), mixup.draw(10), strict=True))


def test_repr_tells_the_arguments():
    assert repr(HardPairMixup(0.5, 0.25, 0.75, positive_candidates=2)) == (
        'HardPairMixup(mixup_alpha=0.5, min_positive_lam=0.25, min_negative_lam=0.75, positive_candidates=2)'
    )


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'mixup_alpha': 0.0}, r'mixup_alpha > 0.*got 0\.0.*mixup_enabled'),
        ({'mixup_alpha': -1.0}, r'mixup_alpha > 0.*got -1\.0'),
        ({'mixup_alpha': float('nan')}, r'mixup_alpha > 0.*got nan'),
        ({'min_positive_lam': -0.1}, r'min_positive_lam in \[0, 1\].*got -0\.1'),
        ({'min_positive_lam': 1.1}, r'min_positive_lam in \[0, 1\].*got 1\.1'),
        ({'min_negative_lam': -0.1}, r'min_negative_lam in \[0, 1\].*got -0\.1'),
        ({'min_negative_lam': float('nan')}, r'min_negative_lam in \[0, 1\].*got nan'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HardPairMixup(**kwargs)


@pytest.mark.parametrize(
    'x, target, num_classes, message',
    [
        (torch.ones(4, 3), torch.zeros(4).long(), None, r'HardPairMixup\(num_classes=\.\.\.\).*\(4, num_classes\)'),
        (torch.ones(4, 3, 2), torch.zeros(4).long(), 2, r'floating-point \(batch_size, width\) matrix'),
        (torch.ones(4, 3), torch.zeros(3).long(), 2, r'class indices \(4,\)'),
        (torch.ones(4, 3), torch.tensor([0, 1, 2, 0]), 2, r'class indices in \[0, 1\], got 0 to 2'),
        (torch.ones(4, 3), torch.ones(4, 3), 2, r'soft targets \(4, 2\).*num_classes=3'),
    ],
    ids=[
        'class indices without num_classes',
        'sequence',
        'mismatched batch',
        'label out of range',
        'other number of classes',
    ],
)
def test_a_batch_that_does_not_fit_is_refused(x, target, num_classes, message):
    with pytest.raises(ValueError, match=message):
        HardPairMixup(num_classes=num_classes)(x, target)


@pytest.mark.parametrize('candidates', [0, 3])
def test_draws_are_copied_to_a_device_at_once_and_unchanged(candidates):
    mixup = HardPairMixup(generator=torch.Generator().manual_seed(0), positive_candidates=candidates)
    draws = mixup.draw(7)
    copied = draws.to(torch.device('cpu', 0))  # another name of the same device
    for name, was, now in zip(draws._fields, draws, copied, strict=True):
        assert torch.equal(was, now), name
    assert copied.positive_candidates.shape == (7, candidates)
    assert all(draw.device.type == 'meta' for draw in draws.to(torch.device('meta')))
