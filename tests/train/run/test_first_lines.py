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
from timm_coretune.train.run.first_lines import log_average, log_data, log_optimization, log_update_size


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
    settings = parse_args(['--coretune', '--data-dir', str(data), '-b', '8', *flags]).settings
    log_contrast(settings, create_datasets(settings.data), processes)
    size = settings.data.batch_size * gathered
    counts = (12, 9, 2, 1)
    positives = sum(n * (n - 1) for n in counts) / 24 * (size - 1) / 23
    alone = sum(n * math.comb(24 - n, size - 1) for n in counts) / 24 / math.comb(23, size - 1)
    (line,) = messages()
    assert line.startswith(f'Contrast over {size} images ({settings.data.batch_size} x {gathered} process(es)')
    assert f'ln {size + 1} = {math.log(size + 1):.2f}.' in line
    assert f'{positives:.1f} positives on average, {100 * alone:.1f} % of the images find none' in line
    few, single = messages('WARNING') if size < 8 else (None, *messages('WARNING'))
    assert single.startswith('1 of 4 classes have one image. It has no positive but its mixture in any batch')
    if few is not None:
        # of the images of the class of one, nothing else than another image would help
        assert few.startswith(f'{100 * (alone - 1 / 24):.1f} % of the images find no other image of their class in a')
        assert '--class-balance gives it to each, and so does a batch of 8 (--batch-size or --contrast' in few


def test_balanced_classes_leave_those_of_one_image_alone(data, messages):
    settings = parse_args(['--coretune', '--data-dir', str(data), '-b', '4', '--class-balance']).settings
    log_contrast(settings, create_datasets(settings.data), 1)
    assert f'{100 / 24:.1f} % of the images have no other' in messages()[0]
    assert [line.split('.')[0] for line in messages('WARNING')] == ['1 of 4 classes have one image']


def test_a_method_without_mixtures_has_none_to_fall_back_on(data, messages):
    settings = parse_args(['--method', 'scl', '--data-dir', str(data), '-b', '8']).settings
    log_contrast(settings, create_datasets(settings.data), 1)
    assert not any('mixture' in line for line in (*messages(), *messages('WARNING')))


def test_the_contrastive_loss_starts_where_the_log_says(messages, data):
    settings = parse_args(['--coretune', '--data-dir', str(data), '-b', '32']).settings
    log_contrast(settings, create_datasets(settings.data), 1)
    task = CoreTuningTask(timm.create_model('test_resnet', num_classes=4), verbose=False)
    # embeddings that are all alike are at chance
    for p in task.get_trainable_module().criterion.projector.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.ones_(list(task.get_trainable_module().criterion.projector.parameters())[-1])
    result = task(torch.rand(32, 3, 32, 32), torch.arange(32) % 4)
    focal = 1 - 1 / 33  # the weight of a positive that is predicted at chance
    assert f'ln 33 = {result["contrast_loss"].item() / focal:.2f}' in messages()[0]


@pytest.mark.parametrize('method', [None, 'dr-tune'])
def test_the_log_shows_the_first_middle_and_last_rate_of_every_group(method, messages):
    settings = OptimizationSettings(head_lr_scale=10, epochs=8, warmup_epochs=0)
    model = timm.create_model('test_resnet', num_classes=4)
    model.conv1.requires_grad_(False)
    if method is None:
        task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    else:  # which keeps a frozen copy of the model
        task = CoreTuningTask(model, method, verbose=False)
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


@pytest.mark.parametrize(
    'sched, on_updates',
    [('cosine', False), ('cosine', True), ('step', False), ('step', True), ('plateau', False)],
)
@pytest.mark.parametrize('epochs, warmup', [(1, 5), (3, 3), (3, 2), (3, 0)])
def test_a_warmup_that_is_not_over_is_warned_of_with_the_highest_rate(messages, sched, on_updates, epochs, warmup):
    settings = OptimizationSettings(
        epochs=epochs, warmup_epochs=warmup, sched=sched, sched_on_updates=on_updates, head_lr_scale=10
    )
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=4), torch.nn.CrossEntropyLoss())
    optimizer = create_optimizer(settings, task, 0.1)
    scheduler, num_epochs = create_schedule(settings, optimizer, 4)
    log_optimization(task, optimizer, scheduler, num_epochs, 4)
    seen = []
    for epoch in range(num_epochs):  # in the order of the loop
        if epoch:
            scheduler.step(epoch, 0.0)
        for update in range(4):
            seen.append(max(group['lr'] for group in optimizer.param_groups))
            scheduler.step_update(epoch * 4 + update + 1)
    warned = messages('WARNING')
    assert len(warned) == (warmup >= epochs)
    if warned:
        unit, scale = ('updates', 4) if on_updates else ('epochs', 1)
        assert f'Warm-up takes {warmup * scale} {unit}, the run has {epochs * scale}:' in warned[0]
        assert f'The highest is {max(seen):.3g}, not 1.' in warned[0]


def average_of(**kwargs):
    task = ClassificationTask(torch.nn.Linear(1, 2, bias=False), torch.nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(**kwargs)
    return task


@pytest.mark.parametrize(
    'decay, updates, use_warmup, warned',
    [(0.9998, 15, False, True), (0.9998, 15, True, False), (0.9, 15, False, True), (0.73, 15, False, False)]
    + [(0.9998, 10000, False, True), (0.9998, 12000, False, False), (0.9998, 1, False, False)],
)
def test_a_moving_average_that_hardly_moves_is_warned_of(messages, decay, updates, use_warmup, warned):
    task = average_of(decay=decay, use_warmup=use_warmup)
    log_average(task.get_trainable_module(ema=True), updates)
    assert len(messages('WARNING')) == warned
    # what is left of the first weights: they are 1, all after them 0
    weight = task.get_trainable_module().weight
    for update in range(1, updates + 1):
        torch.nn.init.constant_(weight, float(update == 1))
        task.update_ema(step=update)
    left = task.get_trainable_module(ema=True).module.weight.max().item()
    if updates > 1:
        assert (left > 0.1) == warned
    if warned:
        (line,) = messages('WARNING')
        assert f'still hold {100 * left:.2g}' in line.replace(f'{100 * left:.3g}', f'{100 * left:.2g}')
        fitting = float(line.split('--model-ema-decay ')[1].split()[0])
        assert 0.001 < fitting ** (updates - 1) < 0.02
        log_average(average_of(decay=fitting).get_trainable_module(ema=True), updates)
        assert len(messages('WARNING')) == 1


def test_without_a_moving_average_there_is_nothing_to_warn_of(messages):
    log_average(None, 5)
    assert messages('WARNING') == []
