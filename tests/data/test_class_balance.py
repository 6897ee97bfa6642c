"""Batches with two of each class, and what an image can expect of a batch"""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_coretune.data.class_balance import ClassBalancedBatchSampler, expected_positives

# batches with two of each class


@st.composite
def balanced_cases(draw):
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    labels = draw(st.permutations(labels))
    num_processes = draw(st.integers(1, 3))
    batch_size = draw(st.integers(-(-4 // num_processes), 8))
    return labels, batch_size, num_processes, draw(st.integers(0, 10**6))


def global_batches(labels, batch_size, num_processes, seed, epoch):
    parts = []
    for rank in range(num_processes):
        sampler = ClassBalancedBatchSampler(labels, batch_size, rank, num_processes, seed)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == len(labels) // (batch_size * num_processes)
        assert all(len(batch) == batch_size for batch in parts[-1])
    # the processes take turns, so that the images that fill a batch are last again
    return [[index for turn in zip(*batch, strict=True) for index in turn] for batch in zip(*parts, strict=True)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(balanced_cases())
def test_every_class_of_a_balanced_batch_is_there_twice_unless_it_has_one_image(case):
    labels, *_ = case
    counts = Counter(labels)
    appeared = Counter()
    for batch in global_batches(*case, epoch=1):
        inside = Counter(labels[index] for index in batch)
        assert all(count >= 2 or counts[label] == 1 for label, count in inside.items())
        # at most the last two fill places no group fits into, with a class that is there already
        whole, filled = batch[:-2], batch[-2:]
        assert len(set(whole)) == len(whole)
        appeared.update(set(batch))
        assert {labels[index] for index in filled if batch.count(index) > 1} <= {labels[index] for index in whole}
    fillers = 2 * (len(labels) // (case[1] * case[2]))
    assert sum(count - 1 for count in appeared.values()) <= fillers


@settings(max_examples=25, deadline=None, derandomize=True)
@given(balanced_cases())
def test_balanced_epochs_differ_and_repeat_by_seed(case):
    first = global_batches(*case, epoch=0)
    assert first == global_batches(*case, epoch=0)
    if len(first) * len(first[0] if first else []) >= 8 and len(set(case[0])) > 1:
        assert first != [global_batches(*case, epoch=epoch) for epoch in (1, 2)]
        assert len({str(global_batches(*case, epoch=epoch)) for epoch in range(6)}) > 1


def test_where_pairs_fill_a_balanced_batch_every_image_comes_once_an_epoch():
    labels = [label for label in range(10) for _ in range(8)]
    batches = global_batches(labels, 8, 2, seed=0, epoch=3)
    assert sorted(index for batch in batches for index in batch) == list(range(80))


# what an image can expect


def expected_by_enumeration(counts, batch_size):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    positives, alone, total = 0, 0, 0
    for batch in itertools.combinations(labels, min(batch_size, len(labels))):
        inside = Counter(batch)
        positives += sum(inside[label] - 1 for label in batch)
        alone += sum(inside[label] == 1 for label in batch)
        total += len(batch)
    return positives / total, alone / total


@pytest.mark.parametrize(
    'counts, batch_size',
    [
        ([3, 2, 1], 3),
        ([4, 4], 5),
        ([1, 1, 1], 2),
        ([6], 4),
        ([5, 1, 3], 9),
        ([2, 3, 0, 4], 4),
        ([2, 2], 99),
        ([3, 5], 1),
    ],
)
def test_expected_positives_are_those_of_all_batches(counts, batch_size):
    assert expected_positives(counts, batch_size) == pytest.approx(
        expected_by_enumeration(counts, batch_size), abs=1e-9
    )


def test_expected_positives_are_those_of_drawn_batches():
    counts, draws = [60] * 20 + [5] * 40, random.Random(0)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    found = [(sum(n * (n - 1) for n in c.values()), sum(n == 1 for n in c.values()))
             for c in (Counter(draws.sample(labels, 64)) for _ in range(4000))]  # fmt: skip
    positives, alone = (sum(values) / 4000 / 64 for values in zip(*found, strict=True))
    assert expected_positives(counts, 64) == pytest.approx((positives, alone), rel=0.02)


@pytest.mark.parametrize('counts', [[1], []], ids=['one-image', 'none'])
def test_an_image_without_company_expects_nothing(counts):
    assert expected_positives(counts, 8) == (0.0, 1.0)
