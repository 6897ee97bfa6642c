"""The head alone in the first epochs, and a learning rate of its own"""

import pytest
import timm
import torch
from runs import train
from timm.task import ClassificationTask

from timm_coretune import CoreTuningTask
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.settings import OptimizationSettings
from timm_coretune.train.freezing import BackboneFreezer, head_parameters
from timm_coretune.train.optimization import create_optimizer, create_schedule, resolve_lr

CLASSIFIERS = {'test_resnet': 'fc.', 'test_vit': 'head.'}


def create_task(name='test_resnet', coretune=True):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    if coretune:
        return CoreTuningTask(model, verbose=False)
    return ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)


def names_of(task, parameters):
    wanted = {id(p) for p in parameters}
    return {name for name, p in task.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize('name', CLASSIFIERS)
@pytest.mark.parametrize('coretune', [True, False], ids=['coretune', 'plain'])
def test_the_head_is_the_classifier_and_what_the_task_trains_beside_the_model(name, coretune):
    task = create_task(name, coretune)
    model = task.get_eval_model()
    classifier = {id(p) for n, p in model.named_parameters() if n.startswith(CLASSIFIERS[name])}
    backbone = {id(p) for p in model.parameters()} - classifier
    head = {id(p) for p in head_parameters(task)}
    assert head == {id(p) for p in task.get_trainable_module().parameters()} - backbone
    assert len(classifier) == 2
    assert (len(head) > 2) == coretune


def checkpoints(folder, epochs):
    states = [torch.load(folder / f'checkpoint-{epoch}.pth.tar', weights_only=False) for epoch in range(epochs)]
    tensors = []
    for state in states:
        projector = {f'projector.{key}': value for key, value in state['task_state']['projector'].items()}
        tensors.append({**state['state_dict'], **projector})
    return tensors


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_only_the_head_changes_at_first_and_everything_afterwards(tiny_images, tmp_path, name):
    flags = ['--model', name, '-b', 4, '--lr', 0.1, '--epochs', 3, '--freeze-epochs', 2, '--drop-path', 0.5]
    flags += ['--coretune', '--opt', 'sgd']
    folder = train(tiny_images((4, 4, 4), (1, 1, 1)), tmp_path, *flags)
    first, second, third = checkpoints(folder, 3)

    def changed(a, b):
        return {key for key in a if not torch.equal(a[key], b[key])}

    heads = (CLASSIFIERS[name], 'projector.')
    frozen = {key for key in first if not key.startswith(heads)}
    assert {key for key in first if key.startswith(heads)} >= changed(first, second) >= {f'{CLASSIFIERS[name]}weight'}
    assert {key for key in changed(first, second) if key.startswith('projector.')}
    assert all(first[key].eq(0).all() for key in first if key.endswith(('running_mean', 'num_batches_tracked')))
    everything = {key for key, value in first.items() if value.numel()}
    assert changed(second, third) & frozen == everything & frozen
    assert not any(second[key].isnan().any() for key in second)


def test_what_was_frozen_before_stays_so():
    task = create_task()
    stem = list(task.get_eval_model().conv1.parameters())
    for p in stem:
        p.requires_grad_(False)
    others = names_of(task, task.parameters()) - names_of(task, stem)
    freezer = BackboneFreezer(task, 2)
    assert freezer.start_epoch(0)
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained == names_of(task, head_parameters(task))
    assert not freezer.start_epoch(1)
    assert freezer.start_epoch(2)
    assert {name for name, p in task.named_parameters() if p.requires_grad} == others
    assert not freezer.start_epoch(3)


def test_a_run_that_starts_after_the_frozen_epochs_freezes_nothing():
    task = create_task()
    freezer = BackboneFreezer(task, 2)
    assert not freezer.start_epoch(2)
    assert all(p.requires_grad for p in task.get_trainable_module().parameters())


def test_a_frozen_backbone_is_in_evaluation_mode_and_the_head_is_not():
    task = create_task()
    model = task.get_eval_model()
    freezer = BackboneFreezer(task, 1)
    for epoch, backbone_trains in ((0, False), (1, True)):
        freezer.start_epoch(epoch)
        task.get_trainable_module().train()
        freezer.after_train_mode()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert {m.training for m in norms} == {backbone_trains}
        assert model.fc.training
        assert model.training


# a rate of its own


def rates(task, *flags):
    """Learning rate of each parameter at the first epochs, as timm's scheduler sets it."""
    words = ['--data-dir', '.', '--lr', '0.08', '--epochs', '4', '--warmup-epochs', '1', *flags]
    settings = parse_args(words).settings.optimization
    optimizer = create_optimizer(settings, task, settings.lr)
    scheduler, _ = create_schedule(settings, optimizer, updates_per_epoch=5)
    names = {id(p): name for name, p in task.named_parameters()}
    seen = []
    for epoch in range(4):
        scheduler.step(epoch)
        groups = [(p, group) for group in optimizer.param_groups for p in group['params']]
        assert len(groups) == len(names)
        seen.append({names[id(p)]: (group['lr'], group['weight_decay']) for p, group in groups})
    return seen


@pytest.mark.parametrize('extra', [[], ['--layer-decay', '0.5']], ids=['flat', 'layer-decay'])
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_the_head_has_its_own_rate_through_the_schedule(name, extra):
    task = create_task(name)
    head = names_of(task, head_parameters(task))
    plain, scaled = rates(task, *extra), rates(task, *extra, '--head-lr-scale', '10')
    for before, after in zip(plain, scaled, strict=True):
        assert before.keys() == after.keys()
        for key in before:
            assert after[key][0] == pytest.approx(before[key][0] * (10 if key in head else 1))
            assert after[key][1] == before[key][1]
    assert (len({lr for lr, _ in plain[1].values()}) > 2) == bool(extra)


def test_a_rate_of_the_head_holds_without_a_scheduler_too():
    task = create_task()
    settings = OptimizationSettings(head_lr_scale=10, sched='none')
    optimizer = create_optimizer(settings, task, 0.08)
    scheduler, _ = create_schedule(settings, optimizer, 5)
    head = {id(p) for p in head_parameters(task)}
    for group in optimizer.param_groups:
        assert {id(p) in head for p in group['params']} == {group['lr'] != 0.08}
        assert group['lr'] == pytest.approx(0.8 if id(group['params'][0]) in head else 0.08)
    assert scheduler is None


@pytest.mark.parametrize('head_lr_scale', [1.0, 10.0])
def test_a_decay_from_layer_to_layer_holds_without_a_scheduler_too(head_lr_scale):
    task = create_task()
    given = dict(layer_decay=0.5, head_lr_scale=head_lr_scale, warmup_epochs=0)
    alone = create_optimizer(OptimizationSettings(sched='none', **given), task, 0.08)
    scheduled = create_optimizer(OptimizationSettings(**given), task, 0.08)
    scheduler, _ = create_schedule(OptimizationSettings(**given), scheduled, 5)
    scheduler.step(0)
    assert [group['lr'] for group in alone.param_groups] == [group['lr'] for group in scheduled.param_groups]
    head = {id(p) for p in head_parameters(task)}
    rates = {group['lr'] / 0.08 for group in alone.param_groups if id(group['params'][0]) not in head}
    assert sorted(rates, reverse=True) == pytest.approx([0.5 ** (layer + 1) for layer in range(len(rates))])
    assert len(rates) > 2
    rates = {group['lr'] / 0.08 for group in alone.param_groups if id(group['params'][0]) in head}
    assert rates == {head_lr_scale}


def test_an_accumulation_longer_than_an_epoch_counts_the_batches_of_the_epoch(messages):
    settings = OptimizationSettings(grad_accum_steps=8)
    assert resolve_lr(settings, 64, 2, batches_per_epoch=3) == pytest.approx(0.1 * 64 * 2 * 3 / 256)
    assert messages('WARNING') == ['--grad-accum-steps 8: an epoch has 3 batch(es), and no update has more.']
    assert resolve_lr(settings, 64, 2, batches_per_epoch=8) == pytest.approx(0.1 * 64 * 2 * 8 / 256)


def test_a_learning_rate_that_is_not_given_follows_the_global_batch():
    def lr(opt, batch, processes, accum, scale=''):
        settings = OptimizationSettings(lr_base_scale=scale, opt=opt, grad_accum_steps=accum)
        return resolve_lr(settings, batch, processes)

    assert lr('sgd', 64, 2, 4) == pytest.approx(0.1 * 2)
    assert lr('adamw', 64, 2, 4) == pytest.approx(0.1 * 2**0.5)
    assert lr('adamw', 64, 2, 4, 'linear') == pytest.approx(0.1 * 2)
    assert lr('sgd', 64, 1, 1, 'sqrt') == pytest.approx(0.1 * 0.5)
