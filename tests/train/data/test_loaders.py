"""timm's loaders: the same augmentation whatever loads the images and wherever it starts, and mixup that ends"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from loading import global_states, skip_without_loader_option
from timm.data import FastCollateMixup, Mixup
from timm.task import ClassificationTask

from timm_coretune.data.resumable import SeededCollate
from timm_coretune.train import Trainer
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.batches import batches_from
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.data.loaders import LoaderFactory
from timm_coretune.train.loop_config import LoopConfig


def create_loaders(images, *flags):
    line = ['--data-dir', str(images), '-b', '4', '--workers', '0', *map(str, flags)]
    settings = parse_args(line).settings
    data_config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)
    model = SimpleNamespace(num_classes=2)
    accelerator = SimpleNamespace(device=torch.device('cpu'), num_processes=1, process_index=0)
    factory = LoaderFactory(
        settings.data,
        data_config,
        model,
        accelerator,
        smoothing=settings.loss.smoothing,
        seed=settings.loop.seed,
        epochs=settings.optimization.epochs,
    )
    return factory.create(create_datasets(settings.data))


def read(loader, epoch, start=0):
    return [(input.clone(), target.clone()) for input, target in batches_from(loader, epoch, start)]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


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
    'gpu-augment': [
        '--gpu-augment',
        '--color-jitter-prob',
        0.5,
        '--grayscale-prob',
        0.5,
        '--vflip',
        0.5,
        '--reprob',
        1,
    ],
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


def test_images_that_are_augmented_on_the_device_are_mixed_there_after_it(images):
    loaders = create_loaders(images, '--gpu-augment', '--mixup', 5, '--smoothing', 0)
    assert isinstance(loaders.mixup_fn, Mixup)
    batches = read(loaders.train, 0)
    assert [target.dtype for _, target in batches] == [torch.int64] * len(batches)
    assert any(is_mixed([loaders.mixup_fn(*batch) for batch in batches]))
    assert create_loaders(images, '--mixup', 5).mixup_fn is None


def test_images_are_handed_over_small_and_normalised_as_others(images):
    flags = ['--gpu-augment', '--scale', 1, 1, '--ratio', 1, 1, '--hflip', 0, '--color-jitter', 0]
    loader = create_loaders(images, *flags, '--gpu-augment-size', 24).train
    assert loader.dataset.dataset[0][0][0].shape == (24, 24, 3)
    same_crop = create_loaders(images, *flags[1:], '--train-interpolation', 'bicubic').train
    for (x, s), (y, t) in zip(read(loader, 0), read(same_crop, 0), strict=True):
        assert torch.equal(s, t)
        assert x.shape == y.shape == (4, 3, 16, 16)
        assert (x - y).abs().mean() < 0.2  # of noise, resized twice
        assert abs(x.mean() - y.mean()) < 0.02
        assert 0.7 < x.std() / y.std() < 1.3


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


# labels, and a part of them


@pytest.mark.parametrize('flags', [['--label-fraction', '0.5'], ['--class-balance', '-b', '4']], ids=lambda f: f[0])
def test_a_data_set_that_cannot_tell_its_labels_says_so(monkeypatch, images, flags):
    monkeypatch.setattr('timm_coretune.train.data.datasets.get_labels', lambda dataset: None)
    monkeypatch.setattr('timm_coretune.train.data.loaders.get_labels', lambda dataset: None)
    with pytest.raises(ValueError, match=f'knows the labels of all images for {flags[0]}'):
        create_loaders(images, *flags)
