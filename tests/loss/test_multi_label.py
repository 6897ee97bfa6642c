"""Core-tuning of images with several labels: against loops, and against one label an image bit by bit."""

import multi_label_reference as reference
import pytest
import torch
import torch.nn as nn
from multi_label_worker import CASES as CASES_OF_TWO
from multi_label_worker import METHODS as METHODS_OF_TWO
from multi_label_worker import WORLD_SIZE, scores, step
from ranks import launch_ranks
from timm.data.target_transforms import MultiLabelTarget

from timm_coretune.loss import METHODS, CoreTuningLoss, FocalSupConLoss, SCLLoss, create_method
from timm_coretune.mining import normalize, select_hard_pairs
from timm_coretune.mining.label_sets import select_hard_pairs_of_sets

DIM, CLASSES = 12, 5


def batch_of(size, seed=0, dtype=torch.float64, share=0.35):
    """Features, logits and multi-hot targets, of which the first is without a label."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, DIM, generator=generator, dtype=dtype)
    logits = torch.randn(size, CLASSES, generator=generator, dtype=dtype)
    target = (torch.rand(size, CLASSES, generator=generator) < share).to(dtype)
    target[0] = 0
    return features, logits, target


def loss_of(kind=CoreTuningLoss, dtype=torch.float64, **kwargs):
    torch.manual_seed(3)
    loss = kind(DIM, projection_dim=8, multi_label=True, generator=torch.Generator().manual_seed(5), **kwargs)
    return loss.to(dtype)


CASES = {
    'some labels': batch_of(14),
    'all share a label': (*batch_of(6)[:2], torch.ones(6, CLASSES, dtype=torch.float64)),
    'no image has a label': (*batch_of(6)[:2], torch.zeros(6, CLASSES, dtype=torch.float64)),
    'one shares a label with all': (
        *batch_of(4)[:2],
        torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.float64),
    ),
    'one image': batch_of(1),
    'soft targets': (*batch_of(9)[:2], torch.rand(9, CLASSES, generator=torch.Generator().manual_seed(1)).double()),
}


@pytest.mark.parametrize('case', CASES)
def test_core_tuning_is_what_loops_over_images_give(case):
    features, logits, target = CASES[case]
    loss = loss_of()
    batch, draws = loss.prepare(len(features), features.device)
    got = loss.compute(features, logits, target, batch, draws)
    task, contrast = reference.core_losses(loss, features, logits, target, draws)
    assert got['task_loss'].item() == pytest.approx(task, rel=1e-6)  # shares of mixtures are float32
    assert got['contrast_loss'].item() == pytest.approx(contrast, rel=1e-6, abs=1e-12)
    assert got['loss'].item() == pytest.approx(task + 0.1 * contrast, rel=1e-6)


@pytest.mark.parametrize('case', CASES)
def test_scl_is_what_loops_over_images_give(case):
    features, logits, target = CASES[case]
    loss = loss_of(SCLLoss)
    got = loss.losses(features, logits, target)
    units = loss.projector(features)[1].detach()
    labels = (target >= 0.5).double()
    each = [reference.contrast(units[i], labels, units, i, loss.temperature, focal=False) for i in range(len(labels))]
    assert got['contrast_loss'].item() == pytest.approx(sum(each) / len(each), rel=1e-9, abs=1e-12)
    assert got['task_loss'].item() == pytest.approx(reference.bce(logits, target), rel=1e-9)


@pytest.mark.parametrize('share', [0.05, 0.3, 0.7])
@pytest.mark.parametrize('candidates', [0, 3])
def test_pairs_have_or_lack_a_common_label(share, candidates):
    features, _, target = batch_of(40, share=share)
    draw = torch.rand(40, generator=torch.Generator().manual_seed(1))
    positive_draw = torch.rand(40, candidates, generator=torch.Generator().manual_seed(2))
    pairs = select_hard_pairs_of_sets(features, target, draw, positive_draw=positive_draw)
    expected = reference.find_pairs(features, target, draw)
    for i, (hp, hn, rn, has_negative) in enumerate(expected):
        if not candidates:
            assert pairs.hard_positive[i] == hp
        elif pairs.hard_positive[i] != i:
            assert reference.jaccard(target[i], target[pairs.hard_positive[i]]) > 0
        else:
            assert hp == i
        assert (pairs.hard_negative[i], pairs.random_negative[i], pairs.has_negative[i]) == (hn, rn, has_negative)


@pytest.mark.parametrize('num_classes', [1, 2, 7])
@pytest.mark.parametrize('candidates', [0, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_one_label_a_row_gives_pairs_and_contrast_of_class_indices_bit_by_bit(num_classes, candidates, dtype):
    generator = torch.Generator().manual_seed(num_classes)
    features = torch.randn(48, DIM, generator=generator).to(dtype)
    label = torch.randint(num_classes, (48,), generator=generator)
    sets = torch.stack([MultiLabelTarget(num_classes)([int(c)]) for c in label])
    own, order = torch.arange(8, 32), torch.randperm(48, generator=generator)
    draw, positive_draw = torch.rand(24, generator=generator), torch.rand(24, candidates, generator=generator)
    kwargs = dict(anchor=own, order=order, positive_draw=positive_draw)
    expected = select_hard_pairs(features, label, draw, **kwargs)
    got = select_hard_pairs_of_sets(features, sets, draw, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    unit = normalize(features).requires_grad_()
    extra = normalize(torch.randn(2, 24, DIM, generator=generator).to(dtype))
    for focal in (True, False):
        for extras in ((None, None), (extra[0], extra[1]), (extra[0], None)):
            results = []
            for labels, weight in ((label, None), (sets, torch.ones(24))):
                each = FocalSupConLoss(focal=focal).per_anchor(
                    unit,
                    labels,
                    *extras,
                    has_negative=expected.has_negative,
                    anchor=slice(8, 32),
                    positive_weight=weight,
                )
                results.append((each.detach(), *torch.autograd.grad(each.sum(), unit)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize('method', ['core', 'scl'])
def test_one_label_a_row_gives_the_contrast_of_class_indices_bit_by_bit(method):
    features, logits, _ = batch_of(32, dtype=torch.float32)
    label = torch.arange(32) % CLASSES
    sets = torch.nn.functional.one_hot(label, CLASSES).float()
    found = []
    for multi_label, target in ((False, label), (True, sets)):
        torch.manual_seed(0)
        x = features.clone().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        loss = create_method(method, DIM, generator=generator, multi_label=multi_label)
        contrast = loss.losses(x, logits, target)['contrast_loss']
        found.append((contrast.detach(), *torch.autograd.grad(contrast, x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_criterion_sees_clean_and_mixed_rows():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, logits, target):
            self.seen.append(target)
            return (logits * target).mean()

    features, logits, target = batch_of(8)
    criterion = Recorder()
    loss_of(classification_loss=criterion).losses(features, logits, target)
    clean, positive, negative = criterion.seen
    assert torch.equal(clean, target)
    assert positive.shape == negative.shape == target.shape
    assert ((positive > 0) & (positive < 1)).any()


@pytest.mark.parametrize('method', [name for name, loss in METHODS.items() if not loss.for_multi_label])
def test_a_method_that_compares_classes_is_refused(method):
    with pytest.raises(ValueError, match='one class'):
        create_method(method, DIM, multi_label=True)


@pytest.mark.parametrize(
    'target, message',
    [
        (torch.zeros(4, dtype=torch.int64), 'Expected multi-hot targets .4, 5.'),
        (torch.zeros(4, CLASSES, dtype=torch.int64), 'floating-point'),
        (torch.zeros(4, CLASSES + 1), '5 classes'),
        (torch.full((4, CLASSES), 1.5), 'in .0, 1.'),
        (torch.full((4, CLASSES), float('nan')), 'in .0, 1.'),
        (torch.zeros(3, CLASSES), 'same batch'),
    ],
)
def test_other_targets_are_refused(target, message):
    features, logits, _ = batch_of(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        loss_of(dtype=torch.float32)(features, logits, target)


@pytest.mark.parametrize('kind', [CoreTuningLoss, SCLLoss])
def test_the_compiled_loss_is_equal(kind):
    features, logits, target = batch_of(10, dtype=torch.float32)
    loss = loss_of(kind, dtype=torch.float32)
    prepared = loss.prepare(10, features.device)
    expected = loss.compute(features, logits, target, *prepared)['loss']
    compiled = torch.compile(loss.compute, backend='aot_eager', fullgraph=True)
    assert compiled(features, logits, target, *prepared)['loss'].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('kind', [CoreTuningLoss, SCLLoss])
def test_bfloat16_is_near_float32(kind):
    features, logits, target = batch_of(16, dtype=torch.float32)
    loss = loss_of(kind, dtype=torch.float32)
    prepared = loss.prepare(16, features.device)
    expected = loss.compute(features, logits, target, *prepared)['loss']
    with torch.autocast('cpu', torch.bfloat16):
        got = loss.compute(features.bfloat16(), logits.bfloat16(), target, *prepared)['loss']
    assert got.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    ranks = launch_ranks('multi_label_worker.py', WORLD_SIZE, tmp_path)
    for method in METHODS_OF_TWO:
        for case in CASES_OF_TWO:
            one, found = step(method, case), [rank[method, case] for rank in ranks]
            for name, value in one['losses'].items():
                mean = sum(rank['losses'][name] for rank in found) / WORLD_SIZE
                torch.testing.assert_close(mean, value, rtol=1e-10, atol=0, msg=f'{method} {case} {name}')
            for rank in found:
                torch.testing.assert_close(rank['gradients'], one['gradients'], rtol=1e-8, atol=1e-12)
    expected = scores()
    for rank in ranks:
        for got, wanted in zip(rank['scores'], expected, strict=True):
            assert got == pytest.approx(wanted) if isinstance(got, dict) else got == wanted
