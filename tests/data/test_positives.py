"""Positives of a contrasted batch by the counts of the classes, against all batches and against drawn ones"""

import itertools
import random

import pytest

from timm_coretune.data.class_balance import expected_positives
from timm_coretune.data.positives import FEW, describe_positives, share_of_batches_without


def labels_of(counts):
    return [label for label, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize(
    'counts, batch_size',
    [([3, 2, 1], 2), ([3, 2, 1], 3), ([3, 2, 1], 4), ([1, 1, 1], 3), ([1, 1, 1], 9), ([4], 1), ([2, 0, 2, 5], 2)],
)
def test_the_share_of_batches_without_positives_is_that_of_all_batches(counts, batch_size):
    labels = labels_of(counts)
    batches = list(itertools.combinations(labels, min(batch_size, len(labels))))
    expected = sum(len(set(batch)) == len(batch) for batch in batches) / len(batches)
    assert share_of_batches_without(counts, batch_size) == pytest.approx(expected, abs=1e-12)


def test_it_is_that_of_drawn_batches_of_many_classes():
    counts, draws, size = [7] * 150 + [2] * 50, random.Random(0), 14
    labels = labels_of(counts)
    found = [len(set(draws.sample(labels, size))) == size for _ in range(20_000)]
    expected = share_of_batches_without(counts, size)
    assert 0.3 < expected < 0.8
    deviation = (expected * (1 - expected) / len(found)) ** 0.5
    assert sum(found) / len(found) == pytest.approx(expected, abs=4 * deviation)
    assert share_of_batches_without([1] * 5000, 4096) == pytest.approx(1.0)  # no number is too large


def test_the_batch_that_is_recommended_is_enough_and_its_half_is_not():
    counts = [20] * 64
    told, (warning,) = describe_positives(counts, 8, is_balanced=False, has_mixtures=True)
    enough = int(warning.split('so does a batch of ')[1].split()[0])
    assert expected_positives(counts, enough)[1] <= FEW < expected_positives(counts, enough // 2)[1]
    without = 100 * share_of_batches_without(counts, 8)
    assert told.endswith(f'{without:.1f} % of the batches have no two images of a class.')
    assert describe_positives(counts, enough, is_balanced=False, has_mixtures=True)[1] == []
    assert describe_positives(counts, 8, is_balanced=True, has_mixtures=True)[1] == []


def test_no_batch_is_recommended_that_the_data_cannot_fill():
    (warning,) = describe_positives([2] * 8, 12, is_balanced=False, has_mixtures=False)[1]
    assert warning.endswith('in a batch of 12, although there is one. --class-balance gives it to each.')
    (warning,) = describe_positives([1] * 20, 16, is_balanced=False, has_mixtures=False)[1]
    assert warning.startswith('20 of 20 classes have one image. It has no positive in any batch')
