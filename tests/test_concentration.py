"""The counts of benchmarks/concentration.py, compared with loops and with the loss itself"""

import math
from collections import Counter

import pytest
import torch
from concentration import concentrate, mixture_loss, watch

from timm_coretune import CoreTuningLoss
from timm_coretune.mixup import Mixture


def counted_by_loops(chosen, loss, label, is_wrong):
    uses = Counter(chosen)
    order = sorted(range(len(label)), key=lambda row: -uses[row])
    percent = order[: max(1, math.ceil(len(label) * 0.01))]
    of_class = sum(max(uses[row] for row in range(len(label)) if label[row] == c) for c in set(label))
    return (
        100 * uses[order[0]] / len(chosen),
        100 * of_class / len(chosen),
        100 * sum(uses[row] for row in order[:10]) / len(chosen),
        100 * sum(uses[row] for row in percent) / len(chosen),
        100 * sum(part for row, part in zip(chosen, loss, strict=True) if row in percent) / sum(loss),
        100 * sum(is_wrong[row] for row in percent) / len(percent),
        100 * sum(is_wrong) / len(label),
    )


@pytest.mark.parametrize('num_rows', [5, 30, 250])
def test_shares_are_those_of_a_loop(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    chosen = (num_rows * torch.rand(2 * num_rows, generator=generator) ** 4).long()
    loss = torch.rand(2 * num_rows, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (num_rows,), generator=generator)
    is_wrong = torch.rand(num_rows, generator=generator) < 0.4
    found = concentrate(chosen, loss, label, is_wrong)
    expected = counted_by_loops(chosen.tolist(), loss.tolist(), label.tolist(), is_wrong.tolist())
    assert found == pytest.approx(expected, rel=1e-5)


def test_shares_of_a_batch_counted_by_hand():
    # row 1 is chosen 3 of 4 times, row 3 once; rows 0 and 1 are of class 0
    chosen, loss = torch.tensor([1, 1, 3, 1]), torch.tensor([1.0, 2.0, 4.0, 1.0])
    found = concentrate(chosen, loss, torch.tensor([0, 0, 2, 2]), torch.tensor([True, False, True, False]))
    assert found == (75, 100, 100, 75, 50, 0, 50)


def test_the_loss_of_a_mixture_is_its_soft_cross_entropy():
    logits = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)
    mixture = Mixture(torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([0.25, 1.0], dtype=torch.float64))
    expected = []
    for index, other, lam in ((1, 0, 0.25), (2, 0, 1.0)):
        mixed = [lam * float(logits[index, c]) + (1 - lam) * float(logits[other, c]) for c in range(2)]
        total = sum(math.exp(logit) for logit in mixed)
        target = [0.0, 0.0]
        target[{1: 1, 2: 0}[index]] += lam
        target[1] += 1 - lam  # the class of row 0
        expected.append(-sum(t * math.log(math.exp(logit) / total) for t, logit in zip(target, mixed, strict=True)))
    found = mixture_loss(mixture, logits, torch.tensor([1, 1, 0]))
    assert found.tolist() == pytest.approx(expected)


def test_what_is_watched_are_the_pairs_and_losses_of_the_step(monkeypatch):
    # row 0 takes no part; row 4 points away from rows 1 to 3 of its class; rows 5 and 6 are alone in their class
    features = torch.tensor([[0.0, 5.0], [1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [-1.0, 0.0], [0.0, 9.0], [0.0, 1.0]])
    label = torch.tensor([-1, 0, 0, 0, 0, 1, 2])
    logits = 4 * torch.eye(3)[[0, 0, 0, 1, 1, 1, 2]]
    criterion = CoreTuningLoss(2, contrast_weight=0, smooth='positive', smooth_weight=1.0)
    measured = watch(criterion)
    losses = []
    monkeypatch.setattr('concentration.mixture_loss', lambda *args: losses.append(mixture_loss(*args)) or losses[0])
    step = criterion.compute(features, logits, label, *criterion.prepare(7, features.device))
    (found,), (loss,) = measured, losses
    # of the four anchors with a positive, rows 1 to 3 choose row 4
    assert (found.top_row, found.of_class, found.wrong) == (75, 75, 100)
    assert found.wrong_all == pytest.approx(100 * 2 / 6)
    assert found.loss == pytest.approx(100 * float(loss[1:4].sum() / loss[1:5].sum()))
    # the step's loss is that of the clean rows and, with weight 1, that of the mixtures
    clean = torch.nn.functional.cross_entropy(logits[1:], label[1:])
    assert float(step['loss']) == pytest.approx(float(clean + loss[1:].mean()), rel=1e-5)
