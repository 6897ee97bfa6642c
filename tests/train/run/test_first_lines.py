"""The first lines of the log: data, contrast and learning rates"""

import math

import pytest
import timm
import torch
from timm.task import ClassificationTask

from timm_coretune import CoreTuningTask
from timm_coretune.train.classification import log_contrast
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.settings import OptimizationSettings
from timm_coretune.train.data.datasets import Datasets, create_datasets
from timm_coretune.train.optimization import create_optimizer, create_schedule
from timm_coretune.train.run.first_lines import log_data, log_optimization, log_update_size


def test_the_log_counts_images_and_classes(data, messages):
    log_data(create_datasets(parse_args(['--data-dir', str(data)]).settings.data))
    assert messages() == [
        'Training: 24 images of 4 classes, 1 to 12 a class',
        'Validation: 9 images of 4 classes, 1 to 3 a class',
    ]


def test_the_log_admits_that_a_stream_has_no_counts(messages):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

        def __len__(self):
            return 100

    log_data(Datasets(Stream(), None, None, None))
    assert messages() == ['Training: 100 images, classes unknown before they are read']


@pytest.mark.parametrize(
    'flags, processes, gathered',
    [([], 1, 1), ([], 2, 2), (['--no-coretune-gather'], 2, 1), (['-b', '4'], 1, 1)],
    ids=['one', 'two', 'two-apart', 'small'],
)
def test_the_log_says_what_an_image_finds_in_the_contrasted_batch(data, messages, flags, processes, gathered):
    settings = parse_args(['--data-dir', str(data), '-b', '8', *flags]).settings
    log_contrast(settings, create_datasets(settings.data), processes)
    size = settings.data.batch_size * gathered
    counts = (12, 9, 2, 1)
    positives = sum(n * (n - 1) for n in counts) / 24 * (size - 1) / 23
    alone = sum(n * math.comb(24 - n, size - 1) for n in counts) / 24 / math.comb(23, size - 1)
    (line,) = messages()
    assert line.startswith(f'Contrast over {size} images ({settings.data.batch_size} x {gathered} process(es)')
    assert f'ln {size + 1} = {math.log(size + 1):.2f}.' in line
    assert f'{positives:.1f} positives on average, {100 * alone:.1f} % of the images find none' in line
    warned = messages('WARNING')
    assert len(warned) == (size < 8)
    if warned:
        assert f'A batch of {size} is less than twice the 4 classes' in warned[0]


def test_balanced_classes_leave_those_of_one_image_alone_and_need_no_warning(data, messages):
    settings = parse_args(['--data-dir', str(data), '-b', '4', '--class-balance']).settings
    log_contrast(settings, create_datasets(settings.data), 1)
    assert f'{100 / 24:.1f} % of the images have no other' in messages()[0]
    assert messages('WARNING') == []


def test_the_contrastive_loss_starts_where_the_log_says(messages, data):
    settings = parse_args(['--data-dir', str(data), '-b', '32']).settings
    log_contrast(settings, create_datasets(settings.data), 1)
    task = CoreTuningTask(timm.create_model('test_resnet', num_classes=4), verbose=False)
    # embeddings that are all alike are at chance
    for p in task.get_trainable_module().criterion.projector.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.ones_(list(task.get_trainable_module().criterion.projector.parameters())[-1])
    result = task(torch.rand(32, 3, 32, 32), torch.arange(32) % 4)
    focal = 1 - 1 / 33  # the weight of a positive that is predicted at chance
    assert f'ln 33 = {result["contrast_loss"].item() / focal:.2f}' in messages()[0]


def test_the_log_shows_the_first_middle_and_last_rate_of_every_group(messages):
    settings = OptimizationSettings(head_lr_scale=10, epochs=8, warmup_epochs=0)
    model = timm.create_model('test_resnet', num_classes=4)
    model.conv1.requires_grad_(False)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer(settings, task, 0.1)
    scheduler, num_epochs = create_schedule(settings, optimizer, 5)
    before = len(messages())
    log_update_size(16, 3, 2, 5)
    log_optimization(task, optimizer, scheduler, num_epochs, 5)
    lines = messages()[before:]
    assert lines[0] == 'An update: 16 images x 3 batch(es) x 2 process(es) = 96 images; 5 updates an epoch.'
    rates = [0.1 * (1 + math.cos(math.pi * t / 8)) / 2 for t in (0, 4, 7)]
    head = sum(p.numel() for p in model.fc.parameters())
    rest = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
    for count, scale in ((head, 10), (rest, 1)):
        shown = ', '.join(f'{scale * rate:.3g}' for rate in rates)
        assert f'LR of {count:,} parameters: {shown} (first, middle, last).' in lines
    stem = list(model.conv1.parameters())
    assert lines[-1] == f'Frozen: {sum(p.numel() for p in stem):,} parameters in {len(stem)} tensors.'
    assert len(lines) == 4
