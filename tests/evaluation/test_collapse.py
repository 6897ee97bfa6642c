"""SAA and CAC against plain loops over random features, and what is said of features that collapse"""

import math

import pytest
import torch

from timm_coretune.evaluation.collapse import ClassAlignment, describe_alignment, find_collapse, measure_alignment


def by_loops(first, second, label):
    """SAA and CAC of both classes in percent, by comparing every view with every other."""
    views = [(i, row.tolist()) for part in (first, second) for i, row in enumerate(part)]

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    found = []
    for index in (0, 1):
        images = [i for i in range(len(label)) if label[i] == index]
        count = min(int(0.05 * len(views)), 2 * len(images) - 1)
        itself, shares = [], []
        for place, (i, view) in enumerate(views):
            if label[i] != index:
                continue
            others = [other for number, other in enumerate(views) if number != place]
            others.sort(key=lambda other: -cosine(view, other[1]))
            itself.append(others[0][0] == i)
            shares.append(sum(label[j] == index for j, _ in others[:count]) / count)
        found.append((100 * sum(itself) / len(itself), 100 * sum(shares) / len(shares)))
    return found


@pytest.mark.parametrize('counts', [(30, 30), (55, 3), (50, 1)])
@pytest.mark.parametrize('noise', [0.3, 1.5])
def test_the_measures_are_those_of_plain_loops(counts, noise):
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([0] * counts[0] + [1] * counts[1])[torch.randperm(sum(counts), generator=generator)]
    first = torch.randn(len(label), 4, generator=generator) * 7 + label[:, None]
    second = first + noise * 7 * torch.randn(first.shape, generator=generator)
    found = measure_alignment(first, second, label)
    assert [tuple(pair) for pair in found] == [pytest.approx(pair) for pair in by_loops(first, second, label.tolist())]
    assert 5 < found[0].saa < 100


def test_a_class_without_images_has_no_measure():
    x = torch.randn(5, 3)
    found = measure_alignment(x, x, torch.zeros(5, dtype=torch.long))
    assert (found[0].saa, math.isnan(found[1].saa), math.isnan(found[1].cac)) == (100, True, True)
    assert find_collapse(found, found, ['a', 'b']) == []


def test_a_collapse_is_told_by_class_and_healthy_features_are_not():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(80) % 2
    centre = 10 * torch.stack([1 - label, label, *[0 * label] * 6], dim=1)

    def views(own, noise):  # what an image has of its own, and what its views have
        image = own * torch.randn(80, 8, generator=generator)
        return [centre + image + noise * torch.randn(80, 8, generator=generator) for _ in range(2)]

    healthy = measure_alignment(*views(own=3, noise=0.3), label)
    collapsed = measure_alignment(*views(own=0.01, noise=0.3), label)
    assert all(of_class.saa > 90 and of_class.cac > 90 for of_class in healthy)
    assert find_collapse(healthy, healthy, ['cat', 'dog']) == find_collapse(None, collapsed, ['cat', 'dog']) == []
    told = find_collapse(healthy, collapsed, ['cat', 'dog'])
    assert [line.partition(' are hardly told from each other')[0] for line in told] == [
        "Images of the class 'cat'",
        "Images of the class 'dog'",
    ]

    rare = (torch.arange(80) % 20 == 0).long()  # within the other class
    mixed = measure_alignment(*views(own=3, noise=3), rare)
    assert find_collapse(None, mixed, ['cat', 'dog']) == [
        f"Images that are near to those of the class 'dog' are mostly of the class 'cat': CAC is {mixed[1].cac:.1f} %."
    ]


def test_the_description_has_both_classes():
    found = [ClassAlignment(12.34, 50.0), ClassAlignment(100.0, 0.0)]
    assert describe_alignment(found, ['a', 'b']) == 'a: SAA 12.3 %, CAC 50.0 %; b: SAA 100.0 %, CAC 0.0 %'
