"""The contrastive loss: against loops in float64, by hand, against another library, numerically, and at its edges"""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.miners import BatchHardMiner
from reference import array, classes, focal_contrast, generator, random_features, random_label, random_soft_target

from timm_coretune import FocalSupConLoss
from timm_coretune.mining import normalize

# Values


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
    assert torch.autograd.gradcheck(
        lambda v, plus=None, minus=None: loss(v, label, extra_positive=plus, extra_negative=minus), inputs
    )


# Precision


@pytest.mark.parametrize('focal', [True, False], ids=['focal', 'not focal'])
def test_autocast_does_not_touch_the_contrast_of_given_embeddings(focal):
    v, plus, minus = random_features(9, 60, 16, torch.float32).split(20)
    label, loss = random_label(9, 20, 4), FocalSupConLoss(focal=focal)
    expected = loss(v, label, extra_positive=plus, extra_negative=minus)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = loss(v, label, extra_positive=plus, extra_negative=minus)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)


# Edges


@pytest.mark.parametrize('zero_rows', [[0], [1, 4], list(range(6))], ids=['one', 'two', 'all'])
def test_embeddings_of_zeros_agree_with_the_reference_and_get_no_gradient(zero_rows):
    v, plus, minus = (x.clone() for x in random_features(12, 18, 4).split(6))
    v[zero_rows] = plus[zero_rows] = minus[zero_rows] = 0.0
    inputs = [x.requires_grad_() for x in (v, plus, minus)]
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = FocalSupConLoss()(v, label, extra_positive=plus, extra_negative=minus)
    assert loss.item() == pytest.approx(focal_contrast(array(v), label.tolist(), array(plus), array(minus)), rel=1e-10)
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e3
        assert gradient[zero_rows].eq(0).all()


@pytest.mark.parametrize('which', [0, 1, 2], ids=['embedding', 'extra positive', 'extra negative'])
def test_nan_embeddings_give_a_nan_contrast(which):
    inputs = [x.clone() for x in random_features(17, 18, 4).split(6)]
    inputs[which][3, 1] = float('nan')
    v, plus, minus = inputs
    assert FocalSupConLoss()(v, torch.tensor([0, 0, 1, 1, 2, 2]), extra_positive=plus, extra_negative=minus).isnan()


def test_normalized_rows_have_length_one_or_zero():
    x = random_features(0, 10, 4, torch.bfloat16)
    x[3] = 0.0
    length = normalize(x).norm(dim=1)
    assert length.dtype == torch.float32
    torch.testing.assert_close(length, torch.ones(10).index_fill_(0, torch.tensor([3]), 0.0))


# Errors and descriptions


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan')])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=r'Expected temperature > 0'):
        FocalSupConLoss(temperature)


@pytest.mark.parametrize(
    'args, message',
    [
        ((torch.ones(4, 3, 2), torch.zeros(4).long()), r'Expected embedding as a floating-point'),
        ((torch.ones(4, 3), torch.zeros(3).long()), r'class indices \(4,\)'),
        ((torch.ones(4, 3), torch.zeros(4)), r'integer dtype'),
        ((torch.ones(4, 3), torch.tensor([0, -1, 0, 0])), r'non-negative, got -1 to 0'),
        (
            (torch.ones(4, 3), torch.zeros(4).long(), {'extra_positive': torch.ones(3, 3)}),
            r'extra_positive \(4, 3\).*got \(3, 3\)',
        ),
        (
            (torch.ones(4, 3), torch.zeros(4).long(), {'extra_negative': torch.ones(4, 2)}),
            r'extra_negative \(4, 3\).*got \(4, 2\)',
        ),
    ],
    ids=['sequence', 'mismatched batch', 'float label', 'negative label', 'extra positive', 'extra negative'],
)
def test_embeddings_that_do_not_fit_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        FocalSupConLoss()(*args[:2], **dict(*args[2:]))


def test_the_tuple_of_pairs_of_pytorch_metric_learning_is_not_taken_for_an_embedding():
    embedding, label = random_features(0, 6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    pairs = BatchHardMiner()(embedding, label)
    with pytest.raises(TypeError, match='positional arguments'):
        FocalSupConLoss()(embedding, label, pairs)
    with pytest.raises(TypeError, match='positional arguments'):
        FocalSupConLoss()(embedding, label, torch.ones(6, 4))


# Transformations of torch


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_it_compiles_to_one_graph_that_checks_its_labels(backend):
    torch._dynamo.reset()
    embedding, label = random_features(3, 8, 4).requires_grad_(), random_label(3, 8, 3)
    compiled = torch.compile(FocalSupConLoss(), fullgraph=True, backend=backend)
    loss, expected = compiled(embedding, label), FocalSupConLoss()(embedding, label)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, embedding) for x in (loss, expected)), rtol=1e-10, atol=1e-14)
    with pytest.raises(RuntimeError, match='Expected class indices non-negative'):
        compiled(embedding, label - 1)


def test_it_maps_over_labels_and_checks_all_of_them():
    embedding, labels = random_features(3, 8, 4), torch.stack([random_label(seed, 8, 3) for seed in range(4)])
    loss = FocalSupConLoss()
    mapped = torch.func.vmap(lambda label: loss(embedding, label))(labels)
    torch.testing.assert_close(mapped, torch.stack([loss(embedding, label) for label in labels]), rtol=1e-12, atol=0)
    nested = torch.func.vmap(torch.func.vmap(lambda label: loss(embedding, label)))(labels.view(2, 2, 8))
    torch.testing.assert_close(nested.flatten(), mapped, rtol=1e-12, atol=0)
    labels[2, 1] = -1
    with pytest.raises(ValueError, match='non-negative, got -1 to 2'):
        torch.func.vmap(lambda label: loss(embedding, label))(labels)
