"""Order and augmentation of training images: from seed and place alone, whatever loads them and wherever it starts"""

import itertools
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_options import skip_without_loader_option
from timm.data import FastCollateMixup, ImageDataset, Mixup
from timm.task import ClassificationTask
from tiny_data import write_folders
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, RandomSampler

from timm_coretune.train import Trainer
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.batches import batches_from
from timm_coretune.train.data.class_balance import ClassBalancedBatchSampler, expected_positives
from timm_coretune.train.data.datasets import LabelledSubset, create_datasets, get_labels
from timm_coretune.train.data.loaders import LoaderFactory
from timm_coretune.train.data.resumable import EpochBatchSampler, SeededCollate
from timm_coretune.train.data.seeding import make_key, seeded
from timm_coretune.train.loop import LoopConfig


@pytest.fixture(scope='module')
def images(tiny_images):
    """26 training and 4 validation images of 2 classes, all different."""
    return tiny_images((13, 13), (2, 2), size=12, names=['even', 'odd'])


def create_loaders(images, *flags):
    line = ['--data-dir', str(images), '-b', '4', '--workers', '0', *map(str, flags)]
    args = parse_args(line).args
    data_config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)
    model = SimpleNamespace(num_classes=2)
    accelerator = SimpleNamespace(device=torch.device('cpu'), num_processes=1, process_index=0)
    return LoaderFactory(args, data_config, model, accelerator).create(create_datasets(args))


def read(loader, epoch, start=0):
    return [(input.clone(), target.clone()) for input, target in batches_from(loader, epoch, start)]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


# keys and order


def test_keys_are_distinct_and_depend_on_every_number_and_its_place():
    numbers = range(-1, 12)
    keys = [make_key(*key) for length in (1, 2, 3) for key in itertools.product(numbers, repeat=length)]
    assert len(set(keys)) == len(keys) == 13 + 13**2 + 13**3
    assert all(0 <= key < 2**63 for key in keys)
    assert make_key(1, 23) != make_key(12, 3)
    bits = np.array([[key >> i & 1 for i in range(63)] for key in keys])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.06  # 5 standard deviations of 2379 fair coins are 0.051


def epoch_batches(size=23, batch_size=4, seed=0, rank=0, num_processes=1, drop_last=False):
    if num_processes > 1:
        order = DistributedSampler(range(size), num_replicas=num_processes, rank=rank)
    else:
        order = RandomSampler(range(size))
    return EpochBatchSampler(BatchSampler(order, batch_size, drop_last), seed, rank, num_processes)


def one_epoch(sampler, epoch, skip=0):
    sampler.set_epoch(epoch)
    sampler.skip(skip)
    return list(sampler)


def test_order_and_draws_depend_on_seed_and_epoch_alone():
    first = one_epoch(epoch_batches(), 2)
    used = epoch_batches()
    for epoch in (0, 5, 1):
        one_epoch(used, epoch)
    torch.manual_seed(123)
    assert one_epoch(used, 2) == first
    assert sorted(index for batch in first for _, index in batch) == list(range(23))
    others = [one_epoch(epoch_batches(seed=1), 2), one_epoch(epoch_batches(), 3)]
    for other in others:
        assert [index for batch in other for _, index in batch] != [index for batch in first for _, index in batch]
        assert not {draw.key for batch in other for draw, _ in batch} & {
            draw.key for batch in first for draw, _ in batch
        }
    assert len({draw.key for batch in first for draw, _ in batch}) == 23
    assert {draw.epoch for batch in first for draw, _ in batch} == {2}


@pytest.mark.parametrize('num_processes', [1, 2])
def test_a_pass_from_any_batch_is_the_rest_of_the_whole_pass(num_processes):
    whole = one_epoch(epoch_batches(rank=num_processes - 1, num_processes=num_processes), 4)
    for start in range(len(whole) + 1):
        sampler = epoch_batches(rank=num_processes - 1, num_processes=num_processes)
        assert one_epoch(sampler, 4, skip=start) == whole[start:]
        assert one_epoch(sampler, 4) == whole  # skips once


@pytest.mark.parametrize('num_processes', [2, 3])
def test_processes_together_have_the_batch_of_one_process(num_processes):
    size = 24 * num_processes
    shared = [one_epoch(epoch_batches(size, 4, 7, rank, num_processes), 3) for rank in range(num_processes)]
    order = DistributedSampler(range(size), num_replicas=1, rank=0)
    alone = EpochBatchSampler(BatchSampler(order, 4 * num_processes, False), 7, 0, 1)
    alone = one_epoch(alone, 3)
    assert len(alone) == len(shared[0]) == 6
    for number, batch in enumerate(alone):
        # the images in the order in which a distributed sampler deals them out, each with its draw
        assert batch == [item for items in zip(*(batches[number] for batches in shared), strict=True) for item in items]


def test_one_process_and_a_distributed_sampler_of_one_give_the_same_images():
    order = DistributedSampler(range(23), num_replicas=1, rank=0)
    distributed = EpochBatchSampler(BatchSampler(order, 4, False), 0, 0, 1)
    assert one_epoch(distributed, 5) == one_epoch(epoch_batches(), 5)


# timm's loaders

AUGMENTATIONS = {
    'plain': [],
    'erasing': ['--reprob', 1],
    'randaugment': ['--aa', 'rand-m9-mstd0.5-inc1'],
    'mixup': ['--mixup', 1, '--cutmix', 1, '--mixup-mode', 'elem'],
    'augmix': ['--aug-splits', 2, '--aa', 'augmix-m5-w2', '--resplit', '--reprob', 1],
    'sizes': ['--train-img-sizes', 16, 24, '--train-batch-sizes', 4, 2],
    'balanced': ['--class-balance'],
    'multi-epochs': ['--use-multi-epochs-loader', '--reprob', 1],
    'grey-and-blur': ['--color-jitter-prob', 0.5, '--grayscale-prob', 0.5, '--gaussian-blur-prob', 0.5],
}
ON_CPU = ['--no-prefetcher']
CASES = [pytest.param([*flags], id=name) for name, flags in AUGMENTATIONS.items()]
CASES += [
    pytest.param([*AUGMENTATIONS[name], *ON_CPU], id=f'{name}-no-prefetcher')
    for name in ('erasing', 'sizes', 'multi-epochs')
]


@pytest.mark.parametrize('flags', CASES)
def test_batches_are_the_same_in_any_loader_process_and_from_any_start(images, flags):
    skip_without_loader_option(flags)
    loader = create_loaders(images, *flags).train
    epochs = [read(loader, epoch) for epoch in range(3)]
    assert not same(epochs[0], epochs[1])
    assert all(len(epoch) == len(loader) for epoch in epochs)

    again = create_loaders(images, *flags).train
    assert same(read(again, 1, start=2), epochs[1][2:])
    assert same(read(again, 2), epochs[2])
    assert not same(read(create_loaders(images, *flags, '--seed', 1).train, 0), epochs[0])


@pytest.mark.parametrize('name', ['erasing', 'mixup', 'multi-epochs', 'sizes'])
def test_two_loader_processes_change_nothing(images, name):
    skip_without_loader_option(AUGMENTATIONS[name])
    loader = create_loaders(images, *AUGMENTATIONS[name]).train
    epochs = [read(loader, epoch) for epoch in range(3)]
    parallel = create_loaders(images, *AUGMENTATIONS[name], '--workers', 2).train
    # a restart in the second epoch, then the third by the same processes
    assert same(read(parallel, 1, start=3), epochs[1][3:])
    assert same(read(parallel, 2), epochs[2])


def test_the_prefetcher_changes_images_by_rounding_alone(images):
    fetched, plain = (read(create_loaders(images, *flags).train, 0) for flags in ([], ON_CPU))
    for (x, s), (y, t) in zip(fetched, plain, strict=True):
        assert torch.equal(s, t)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize('flags', [[], ON_CPU], ids=['prefetcher', 'no-prefetcher'])
def test_loading_leaves_the_generators_of_the_process_alone(images, flags):
    loader = create_loaders(images, '--reprob', 1, '--aa', 'rand-m9', '--class-balance', *flags).train
    next(iter(loader))  # a loader of torch draws a seed for its processes when it starts
    before = global_states()[:2]
    read(loader, 0)
    assert global_states()[:2] == before
    batches = batches_from(loader, 1)
    next(batches)
    before = global_states()
    list(batches)
    assert global_states() == before


def test_generators_are_put_back_after_a_block_that_draws():
    before = global_states()
    draws = []
    for _ in range(2):
        with seeded(5):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert global_states() == before


def is_mixed(batches):
    return [bool(((target > 0.1) & (target < 0.9)).any()) for _, target in batches]


@pytest.mark.parametrize('workers', [0, 2])
def test_mixup_ends_at_its_epoch_also_in_processes_that_live_on(images, workers):
    flags = ['--mixup', 5, '--mixup-off-epoch', 2, '--smoothing', 0, '--workers', workers]
    loader = create_loaders(images, *flags).train
    assert any(is_mixed(read(loader, 0)))
    assert any(is_mixed(read(loader, 1)))
    assert not any(is_mixed(read(loader, 2)))
    assert not any(is_mixed(read(loader, 3, start=1)))
    assert any(is_mixed(read(loader, 1)))


def test_a_seeded_collate_mixes_without_an_end_when_there_is_none():
    mixing = FastCollateMixup(mixup_alpha=5, num_classes=2, label_smoothing=0)
    collate = SeededCollate(mixing)
    draw = SimpleNamespace(epoch=10**6, key=1)
    image = np.zeros((3, 4, 4), dtype=np.uint8)
    assert is_mixed([collate([(draw, (image, i % 2)) for i in range(4)])]) == [True]


def test_mixup_in_the_loop_ends_at_its_epoch():
    seen = []

    class Recording(ClassificationTask):
        def forward(self, input, target):
            seen.append((input, target))
            logits = self.get_trainable_module()(input)
            return {'loss': logits.square().mean(), 'output': logits}

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))
    task = Recording(model, torch.nn.CrossEntropyLoss(), verbose=False)
    mixup = Mixup(mixup_alpha=5, num_classes=2, label_smoothing=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(
        task, optimizer, Accelerator(cpu=True), mixup_fn=mixup, config=LoopConfig(mixup_off_epoch=1, log_interval=1)
    )
    batches = [(torch.rand(4, 3, 16, 16), torch.tensor([0, 0, 1, 1]))] * 2
    for epoch in (0, 1, 2, 0):
        trainer.train_one_epoch(epoch, batches)
    assert is_mixed(seen) == [True, True, False, False, False, False, True, True]
    # every step draws anew, and the same in the same place
    targets = [target for _, target in seen]
    assert torch.equal(targets[0], targets[6])
    assert torch.equal(targets[1], targets[7])
    assert not torch.equal(targets[0], targets[1])


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
    return [[index for part in batch for index in part] for batch in zip(*parts, strict=True)]


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


# labels, and a part of them


def fraction_of(tiny_images, counts, fraction, seed=42):
    path = tiny_images(counts, size=4, in_turn=False)
    args = parse_args(['--data-dir', str(path), '--val-split=', '--label-fraction', str(fraction), '--seed', str(seed)])
    return create_datasets(args.args).train


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


class _Stream(IterableDataset):
    targets = (0, 1)

    def __iter__(self):
        return iter([])


def test_labels_are_known_without_reading_an_image(tmp_path, images):
    folders = ImageDataset(str(write_folders(tmp_path / 'folders', {'b': 1, 'a': 2, 'c': 3}, size=4)))
    assert get_labels(folders) == [0, 0, 1, 2, 2, 2]  # a, b, c
    assert get_labels(LabelledSubset(folders, [5, 0, 2])) == [2, 0, 1]
    assert get_labels(create_datasets(parse_args(['--data-dir', str(images)]).args).train) == [0, 1] * 13
    for targets in ([2, 0, 1], torch.tensor([2, 0, 1]), list(torch.tensor([2, 0, 1]))):
        assert get_labels(SimpleNamespace(targets=targets)) == [2, 0, 1]
    assert get_labels(SimpleNamespace(samples=[('x.png', 1), ('y.png', 0)])) == [1, 0]


def test_labels_that_cannot_be_told_are_none(tmp_path):
    assert get_labels(_Stream()) is None
    assert get_labels(SimpleNamespace()) is None
    assert get_labels(SimpleNamespace(targets=['dog', 'cat'])) is None
    folders = ImageDataset(
        str(write_folders(tmp_path / 'folders', {'b': 1, 'a': 2, 'c': 3}, size=4)), target_transform=lambda target: 0
    )
    assert get_labels(folders) is None
    assert get_labels(LabelledSubset(folders, [0])) is None


@pytest.mark.parametrize('flags', [['--label-fraction', '0.5'], ['--class-balance', '-b', '4']], ids=lambda f: f[0])
def test_a_data_set_that_cannot_tell_its_labels_says_so(monkeypatch, images, flags):
    monkeypatch.setattr('timm_coretune.train.data.datasets.get_labels', lambda dataset: None)
    monkeypatch.setattr('timm_coretune.train.data.loaders.get_labels', lambda dataset: None)
    with pytest.raises(ValueError, match=f'knows the labels of all images for {flags[0]}'):
        create_loaders(images, *flags)
