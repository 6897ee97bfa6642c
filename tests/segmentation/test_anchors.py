"""Which pixels are contrasted, against loops over images, classes and pixels that follow the rule as it is written"""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_reference import anchors_of_batch, label_in_the_middle

from timm_coretune.segmentation.anchors import draw_noise, sample_anchors
from timm_coretune.segmentation.task import label_of_cells


def images(seed, batch_size=5, num_pixels=60, num_classes=4, ignored=0.2, wrong=0.4):
    """Labels with frequencies in proportion to 1, 1/2, 1/3, ..., which pixels are wrong, and a seed for each image."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, num_classes + 1).repeat(batch_size, 1)
    label = torch.multinomial(frequency, num_pixels, replacement=True, generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = -1
    hard = torch.rand(label.shape, generator=generator) < wrong
    return label, hard, torch.randint(2**32, (batch_size,), generator=generator)


def chosen(anchors):
    """Pixels of every image in the order of their places."""
    return [index[there].tolist() for index, there in zip(*anchors, strict=True)]


@pytest.mark.parametrize('num_anchors', [1, 3, 4, 17, 47, 60, 75])
@pytest.mark.parametrize(
    'kwargs',
    [{}, {'wrong': 0.0}, {'wrong': 1.0}, {'wrong': 0.05}, {'ignored': 0.9}, {'num_classes': 1}, {'num_classes': 21}],
    ids=str,
)
def test_anchors_are_those_of_loops_over_images_classes_and_pixels(kwargs, num_anchors):
    label, hard, seed = images(1, **kwargs)
    anchors = sample_anchors(label, hard, seed, num_anchors)
    expected = anchors_of_batch(label, hard, seed, num_anchors)
    assert [set(row) for row in chosen(anchors)] == [set(row) for row in expected]
    assert [len(row) for row in chosen(anchors)] == [len(row) for row in expected]
    assert anchors.index.shape == anchors.is_pixel.shape == (len(label), num_anchors)
    assert (anchors.index.dtype, anchors.is_pixel.dtype) == (torch.int64, torch.bool)
    assert 0 <= anchors.index.min() <= anchors.index.max() < label.shape[1]  # empty places can be gathered too


def test_classes_take_turns_and_hard_pixels_alternate_with_easy_ones():
    label = torch.tensor([[0] * 8 + [2] * 8 + [5] * 2 + [-1] * 4])
    hard = torch.tensor([[True] * 3 + [False] * 5 + [True] * 8 + [False] * 2 + [True] * 4])
    (pixels,) = chosen(sample_anchors(label, hard, torch.tensor([3]), 14))
    assert Counter(label[0, pixels].tolist()) == {0: 6, 2: 6, 5: 2}
    of_first = [p for p in pixels if label[0, p] == 0]
    # three of each kind, as there are three hard ones; a class without easy pixels gives hard ones only
    assert [bool(hard[0, p]) for p in of_first] == [True, False] * 3
    assert all(hard[0, p] for p in pixels if label[0, p] == 2)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    pixels=st.lists(st.tuples(st.integers(-1, 4), st.booleans()), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    num_anchors=st.integers(1, 45),
)
def test_places_are_shared_out_evenly_among_classes_and_half_of_them_to_hard_pixels(pixels, seed, num_anchors):
    label, hard = torch.tensor([[y for y, _ in pixels]]), torch.tensor([[h for _, h in pixels]])
    (found,) = chosen(sample_anchors(label, hard, torch.tensor([seed]), num_anchors))
    there = Counter(y for y, _ in pixels if y >= 0)
    taken = Counter(pixels[p][0] for p in found)
    assert len(set(found)) == len(found) == min(num_anchors, sum(there.values()))
    assert set(taken) <= set(there)
    most = max(taken.values(), default=0)
    assert all(taken[y] >= most - 1 or taken[y] == there[y] for y in there)
    for y, count in taken.items():
        num_hard = sum(h for label, h in pixels if label == y)
        num_easy = there[y] - num_hard
        expected = max(min((count + 1) // 2, num_hard), count - num_easy)
        assert sum(pixels[p][1] for p in found if pixels[p][0] == y) == expected


def test_an_image_of_ignored_pixels_has_empty_places_only():
    label, hard, seed = images(2)
    alone = sample_anchors(label, hard, seed, 20)
    label[3] = -1
    anchors = sample_anchors(label, hard, seed, 20)
    assert anchors.is_pixel.any(dim=1).tolist() == [True, True, True, False, True]
    others = [0, 1, 2, 4]
    assert torch.equal(anchors.index[others], alone.index[others])


def test_more_places_than_pixels_hold_every_pixel_that_counts_once():
    label, hard, seed = images(3, num_pixels=10, ignored=0.3)
    for row, pixels in zip(label, chosen(sample_anchors(label, hard, seed, 64)), strict=True):
        assert sorted(pixels) == (row >= 0).nonzero().flatten().tolist()


def test_the_choice_in_an_image_depends_on_nothing_else_in_the_batch():
    label, hard, seed = images(4, batch_size=6)
    together = chosen(sample_anchors(label, hard, seed, 16))
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    assert chosen(sample_anchors(label[order], hard[order], seed[order], 16)) == [together[i] for i in order]
    for i, expected in enumerate(together):
        own = slice(i, i + 1)
        assert chosen(sample_anchors(label[own], hard[own], seed[own], 16)) == [expected]


def test_seeds_choose_differently_and_the_same_seed_alike():
    label, hard, _ = images(5, batch_size=1, num_pixels=400)
    choices = [chosen(sample_anchors(label, hard, torch.tensor([seed]), 16))[0] for seed in range(20)]
    assert len({frozenset(choice) for choice in choices}) == 20
    assert chosen(sample_anchors(label, hard, torch.tensor([7]), 16)) == [choices[7]]


def test_every_pixel_of_a_class_is_chosen_equally_often():
    num_images, num_pixels, num_anchors = 4000, 50, 5
    label = torch.zeros(num_images, num_pixels, dtype=torch.int64)
    found = sample_anchors(label, label.bool(), torch.arange(num_images), num_anchors).index
    times = torch.bincount(found.flatten(), minlength=num_pixels).double()
    expected = num_images * num_anchors / num_pixels
    assert ((times - expected).square() / expected).sum() < 110  # chi-square of 49 degrees exceeds 110 once in 1e6


def test_noise_is_different_for_all_pixels_of_an_image_and_for_all_images():
    noise = draw_noise(torch.tensor([0, 1, 2, 12345, 2**32 - 1]), 50_000)
    assert noise.dtype == torch.int64
    assert 0 <= noise.min() <= noise.max() < 2**32
    for row in noise:
        assert len(row.unique()) == 50_000
    for one in range(5):
        for other in range(one):
            # of 50,000 and 50,000 values 0.6 agree by chance
            assert len(set(noise[one].tolist()) & set(noise[other].tolist())) <= 8


def lowbias32(x):
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_noise_is_the_published_hash_of_a_pixel_and_of_the_seed_of_its_image():
    seeds = [0, 77, 2**31, 2**32 - 1]
    expected = [[lowbias32(lowbias32(pixel) ^ seed) for pixel in range(2000)] for seed in seeds]
    assert draw_noise(torch.tensor(seeds), 2000).tolist() == expected


@pytest.mark.parametrize('num_bins', [16, 64])
@pytest.mark.parametrize('shift', [0, 1])
def test_noise_is_uniform(num_bins, shift):
    """By its high bits and by its low ones, of many pixels of one image and of one pixel of many images."""
    of_pixels = draw_noise(torch.tensor([42]), 40_000).flatten()
    of_images = draw_noise(torch.arange(40_000), 3)[:, 2]
    for noise in (of_pixels, of_images):
        bins = noise % num_bins if shift else noise * num_bins >> 32
        times = torch.bincount(bins, minlength=num_bins).double()
        expected = 40_000 / num_bins
        assert ((times - expected).square() / expected).sum() < {16: 56, 64: 132}[num_bins]  # once in 1e6


def test_noise_of_neighbouring_pixels_and_of_consecutive_seeds_is_not_correlated():
    noise = draw_noise(torch.arange(200), 200).double() / 2**32
    for one, other in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 5 / 200


def test_noise_is_the_same_on_every_call_and_however_many_pixels_there_are():
    seed = torch.tensor([5, 6])
    assert torch.equal(draw_noise(seed, 100), draw_noise(seed, 100))
    assert torch.equal(draw_noise(seed, 100)[:, :30], draw_noise(seed, 30))


@pytest.mark.parametrize('size', [(7, 5), (21, 33), (48, 64), (10, 3)], ids=str)
@pytest.mark.parametrize('cells', [(1, 1), (2, 3), (3, 2), (5, 3), (6, 1)], ids=str)
def test_the_label_of_a_cell_is_that_of_the_pixel_in_its_middle(size, cells):
    mask = torch.randint(200, (3, *size), generator=torch.Generator().manual_seed(0))
    expected = [label_in_the_middle(image, *cells) for image in mask.tolist()]
    assert label_of_cells(mask, *cells).tolist() == expected


def test_the_middle_of_a_cell_is_found_exactly_for_every_size():
    wrong = []
    for num_cells in range(1, 31):
        for num_pixels in range(num_cells, 180):
            mask = torch.arange(num_pixels)[None, :, None]
            found = label_of_cells(mask, num_cells, 1)[0].tolist()
            if found != [int((i + Fraction(1, 2)) * num_pixels / num_cells) for i in range(num_cells)]:
                wrong.append((num_cells, num_pixels))
    assert not wrong
