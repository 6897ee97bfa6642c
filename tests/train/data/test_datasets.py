"""Labels of a data set, and a part of them"""

from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from runs import train
from timm.data import ImageDataset
from tiny_data import write_folders
from torch.utils.data import IterableDataset

from timm_coretune.data.safetensors_reader import ReaderSafetensors
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.data.labelled import LabelledSubset, get_labels


def fraction_of(tiny_images, counts, fraction, seed=42):
    path = tiny_images(counts, size=4, in_turn=False)
    args = parse_args(['--data-dir', str(path), '--val-split=', '--label-fraction', str(fraction), '--seed', str(seed)])
    return create_datasets(args.settings.data, seed=args.settings.loop.seed).train


@pytest.mark.parametrize(
    'counts, fraction, expected',
    [
        ([10, 20, 40], 0.5, [5, 10, 20]),
        ([10, 4, 1], 0.1, [1, 1, 1]),
        ([7, 3], 0.3, [2, 1]),
        ([5, 9], 1.0, [5, 9]),
    ],
    ids=['half', 'at-least-one', 'rounded', 'all'],
)
def test_a_label_fraction_takes_the_same_share_of_each_class(tiny_images, counts, fraction, expected):
    labels = get_labels(fraction_of(tiny_images, counts, fraction))
    assert [Counter(labels)[label] for label in range(len(counts))] == expected


def test_a_label_fraction_is_drawn_by_seed_and_image(tiny_images):
    a, b, c = (fraction_of(tiny_images, [30, 30], 0.5, seed).indices for seed in (1, 1, 2))
    assert a == b != c
    assert a == sorted(set(a))
    assert [index - 30 for index in a if index >= 30] != [index for index in a if index < 30]
    part = fraction_of(tiny_images, [30, 30], 0.5, 1)
    assert [part[i][1] for i in range(len(part))] == get_labels(part)


def test_a_part_hands_its_transform_to_the_whole(tiny_images):
    part = fraction_of(tiny_images, [4, 4], 0.5)
    part.transform = lambda image: image.size
    assert part.transform is part.dataset.transform
    assert part[0] == ((4, 4), 0)


def make_folders(tmp_path):
    return str(write_folders(tmp_path / 'folders', {'b': 1, 'a': 2, 'c': 3}, size=4))


class _Stream(IterableDataset):
    targets = (0, 1)

    def __iter__(self):
        return iter([])


def test_labels_are_known_without_reading_an_image(tmp_path, images):
    folders = ImageDataset(make_folders(tmp_path))
    assert get_labels(folders) == [0, 0, 1, 2, 2, 2]  # a, b, c
    assert get_labels(LabelledSubset(folders, [5, 0, 2])) == [2, 0, 1]
    assert get_labels(create_datasets(parse_args(['--data-dir', str(images)]).settings.data).train) == [0, 1] * 13
    for targets in ([2, 0, 1], torch.tensor([2, 0, 1]), list(torch.tensor([2, 0, 1]))):
        assert get_labels(SimpleNamespace(targets=targets)) == [2, 0, 1]
    assert get_labels(SimpleNamespace(samples=[('x.png', 1), ('y.png', 0)])) == [1, 0]


def test_labels_that_cannot_be_told_are_none(tmp_path):
    assert get_labels(_Stream()) is None
    assert get_labels(SimpleNamespace()) is None
    assert get_labels(SimpleNamespace(targets=['dog', 'cat'])) is None
    folders = ImageDataset(make_folders(tmp_path), target_transform=lambda target: 0)
    assert get_labels(folders) is None
    assert get_labels(LabelledSubset(folders, [0])) is None


class _CountedLabels(torch.Tensor):
    reads: ClassVar = []

    def tolist(self):
        if self.ndim:  # of all images
            self.reads.append(len(self))
        return super().tolist()


def test_a_run_reads_the_labels_of_each_split_once(tiny, tmp_path, monkeypatch):
    open_reader = ReaderSafetensors.__init__

    def init(self, *args):
        open_reader(self, *args)
        self.label = self.label.as_subclass(_CountedLabels)

    monkeypatch.setattr(ReaderSafetensors, '__init__', init)
    monkeypatch.setattr(_CountedLabels, 'reads', [])
    flags = ('--coretune', '--class-balance', '--loss-class-weight', 'inv_freq', '--label-fraction', '0.7')
    train(tiny, tmp_path, *flags, '--epochs', '1')
    assert sorted(_CountedLabels.reads) == [12, 24]
