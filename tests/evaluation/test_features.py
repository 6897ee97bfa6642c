"""Figures of features: against scikit-learn, loops, and values found by hand"""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from timm_coretune.evaluation import features as module
from timm_coretune.evaluation.features import class_scatter, knn_predict, measure_features, rank_me


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('block', [1, 7 * 60, 2**24])
@pytest.mark.parametrize('temperature', [0.07, 0.001])
def test_knn_is_that_of_scikit_learn_in_blocks_of_any_size(block, temperature, monkeypatch):
    monkeypatch.setattr(module, '_BLOCK_ELEMENTS', block)
    bank, labels, queries = draw(60, 4), torch.arange(60) % 3, draw(30, 4, seed=1)
    reference = KNeighborsClassifier(
        20, metric='cosine', weights=lambda distance: np.exp(-np.float64(distance) / temperature)
    ).fit(bank, labels)
    predictions, neighbours = knn_predict(queries, bank, labels, 3, temperature=temperature)
    assert predictions.tolist() == reference.predict(queries).tolist()
    assert len(set(predictions.tolist())) == 3
    assert neighbours.tolist() == reference.kneighbors(queries, return_distance=False).tolist()


def test_of_equal_neighbours_and_equal_votes_the_first_count():
    # columns 1, 3 and 4 of the bank are alike; one more is nearer, another farther
    bank = torch.tensor([[0.0, 1], [1, 1], [1, 0.1], [1, 1], [1, 1], [-1, 0]])
    _, neighbours = knn_predict(torch.tensor([[1.0, 0], [1, 0]]), bank, torch.zeros(6, dtype=torch.int64), 1, k=3)
    assert neighbours.tolist() == [[2, 1, 3], [2, 1, 3]]
    predictions, _ = knn_predict(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([2, 1, 1, 2]), 3, k=4)
    assert predictions.tolist() == [1]


def test_few_near_neighbours_outvote_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([1, 0, 0])
    for temperature, expected in ((0.07, 1), (100.0, 0)):
        assert knn_predict(bank[:1], bank, labels, 2, k=3, temperature=temperature)[0].item() == expected


def test_rank_me_is_the_exponential_of_the_entropy():
    x = draw(40, 6) * torch.tensor([5.0, 3, 1, 1, 0.1, 1e-4])
    values = np.linalg.svd(x.numpy().astype(np.float64), compute_uv=False)
    share = [value / sum(values) for value in values]
    assert rank_me(x) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-9)
    assert rank_me(torch.eye(5)) == pytest.approx(5)
    assert rank_me(torch.ones(7, 3)) == pytest.approx(1)
    assert rank_me(3 * x) == pytest.approx(rank_me(x))


def scatter_by_loops(x, labels):
    x = [row / np.linalg.norm(row) for row in x.numpy().astype(np.float64)]
    classes = sorted(set(labels))
    means = {c: sum(z for z, label in zip(x, labels, strict=True) if label == c) / labels.count(c) for c in classes}
    within = sum(sum((z - means[label]) ** 2) for z, label in zip(x, labels, strict=True)) / len(x)
    pairs = [sum((means[c] - means[d]) ** 2) for c in classes for d in classes if c < d]
    return within, sum(pairs) / len(pairs)


def test_scatter_is_that_of_loops():
    labels = [0, 0, 0, 5, 5, 2, 2, 2, 2, 7]
    x = draw(10, 4) + 1
    assert class_scatter(x, torch.tensor(labels)) == pytest.approx(scatter_by_loops(x, labels), rel=1e-9)


def test_scatter_by_hand():
    opposite = torch.tensor([[2.0, 0], [5, 0], [-1, 0]])
    assert class_scatter(opposite, torch.tensor([0, 0, 1])) == (0, 4)
    within, between = class_scatter(opposite, torch.tensor([3, 3, 3]))
    assert within == pytest.approx(8 / 9)  # the mean is 1/3: two are 2/3 away from it, one 4/3
    assert math.isnan(between)


def test_all_figures_together():
    x, bank = draw(30, 4) + 1, draw(9, 4, seed=1) + 1
    labels, bank_labels = torch.arange(30) % 4, torch.arange(9) % 3
    figures = measure_features(x, labels, bank, bank_labels)
    right = knn_predict(x, bank, bank_labels, 3, k=9)[0] == labels
    assert figures == pytest.approx(
        {
            'knn_top1': 100 * right.sum().item() / 30,
            'rank_me': rank_me(x),
            **dict(zip(('within_class', 'between_class'), scatter_by_loops(x, labels.tolist()), strict=True)),
        }
    )
    assert 0 < figures['knn_top1'] < 100
    x[3, 1] = math.inf
    assert all(math.isnan(value) for value in measure_features(x, labels, bank, bank_labels).values())


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(queries=draw(3, 5)), r'as wide as the bank, got \(3, 5\) and \(8, 4\)'),
        (dict(queries=torch.full((3, 4), math.nan)), 'finite queries'),
        (dict(bank=torch.full((8, 4), math.inf)), 'finite bank'),
        (dict(bank_labels=torch.full((8,), 2)), r'in \[0, 1\], got 2 to 2'),
        (dict(bank_labels=torch.zeros(8)), 'integer dtype'),
        (dict(bank_labels=torch.zeros(8, 2)), r'one class for each row of bank, \(8,\), got \(8, 2\)'),
        (dict(k=9), 'k of 1 to 8'),
        (dict(k=0), 'k of 1 to 8'),
        (dict(temperature=0.0), 'temperature above 0'),
    ],
)
def test_errors(change, message):
    arguments = dict(queries=draw(3, 4), bank=draw(8, 4), bank_labels=torch.arange(8) % 2, num_classes=2, k=3)
    assert knn_predict(**arguments)[0].shape == (3,)
    with pytest.raises(ValueError, match=message):
        knn_predict(**{**arguments, **change})


def test_features_that_are_all_zero_have_no_rank():
    with pytest.raises(ValueError, match='collapsed'):
        rank_me(torch.zeros(4, 3))
