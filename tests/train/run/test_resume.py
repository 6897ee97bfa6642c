"""Going on as if nothing had happened: after an interruption, with other flags, and on a full disk"""

import argparse
import logging
import os
import sys
import textwrap
from functools import partial

import pytest
import runs
import timm
import torch
from commands import environment_with, run_command
from paths import ROOT
from runs import ON_CPU, copy_of, outcome, stop_at
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_coretune.train.run.folder import find_newest_state, progress_of, read_state
from timm_coretune.train.run.resume import resume


@pytest.fixture(scope='module')
def data(tiny_images):
    """12 training and 6 validation images of 3 classes."""
    return tiny_images((4, 4, 4), (2, 2, 2), names=['red', 'green', 'blue'], noise=120, tint=60)


FLAGS = (*ON_CPU, '-b', '4', '--epochs', '4', '--coretune')

train = partial(runs.train, base=FLAGS)


# a full disk

FULL_DISK = """
    import resource, sys
    from timm_coretune.train import main
    from timm_coretune.train.run.record import RunRecord
    from accelerate.state import AcceleratorState

    original = RunRecord.save_epoch
    limit, free = 0, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_epoch(self, trainer, epoch, *rest):
        if epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
        try:
            original(self, trainer, epoch, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)

    RunRecord.save_epoch = save_epoch
    for name, limit in (('weights', 200_000), ('state', 2_000_000), ('summary', 10)):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            main([*sys.argv[1:], '--experiment', name])
        except SystemExit as e:
            print(f'{name}: {e.code}')
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_state_before_and_says_where_it_is(tmp_path, data, read_csv, straight):
    # the loss falls in every epoch, so that weights are due each time
    flags = [*FLAGS, '--data-dir', str(data), '--output', str(tmp_path), '--eval-metric', 'loss', '--lr', '0.001']
    command = [sys.executable, '-c', textwrap.dedent(FULL_DISK), *flags]
    finished = run_command(command, environment_with(PYTHONPATH=str(ROOT)), check=False)
    ended = [line for line in finished.stdout.splitlines() if line[:7] in ('weights', 'state: ', 'summary')]
    assert ended == ['weights: 2', 'state: 2', 'summary: 2'], finished.stderr
    error = 'train.py: error: '
    said = [line.removeprefix(error) for line in finished.stderr.splitlines() if line.startswith(error)]
    for name, message in zip(('weights', 'state', 'summary'), said, strict=True):
        folder = tmp_path / name
        state = folder / 'last.pth.tar'
        assert message.startswith(f'Could not write to {str(folder)!r}: ')
        assert message.endswith(f'intact: {state}. Make room, then continue with --resume auto.')
        assert progress_of(read_state(str(state))) == (2, 0)
        assert find_newest_state(str(folder)) == str(state)
        assert not [path.name for path in folder.iterdir() if 'tmp' in path.name]
        timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'model_best.safetensors'))
    assert [row['epoch'] for row in read_csv(tmp_path / 'summary' / 'summary.csv')] == ['0', '1']
    # once there is room, the run goes on as if nothing had happened
    expected = straight('--eval-metric', 'loss', '--lr', 0.001)
    train(data, tmp_path, *flags, '--experiment', 'state', '--resume', 'auto')
    assert outcome(tmp_path / 'state') == outcome(expected)


# going on


CONFIGURATIONS = {
    'coretune': [],
    'ema-plateau-accumulation': [
        *('--model-ema', '--model-ema-decay', '0.7', '--sched', 'plateau', '--patience-epochs', '0', '--decay-rate'),
        *('0.5', '-b', '2', '--grad-accum-steps', '2', '--opt', 'adamw', '--lr', '0.003', '--recovery-interval', '1'),
        *('--metrics', 'ece', '--eval-metric', 'ece', '--head-lr-scale', '3', '--freeze-epochs', '1'),
        *('--checkpoint-hist', '2'),
    ],
    'contrast': [
        *('-b', '2', '--contrast-batch-size', '4', '--grad-accum-steps', '2', '--drop', '0.2'),
        *('--recovery-interval', '1', '--mixup', '0.5', '--sched-on-updates'),
        *('--model-ema', '--model-ema-decay', '0.7'),
    ],
    'updates-mixup-erasing': [
        *('--sched-on-updates', '--mixup', '0.5', '--reprob', '0.5', '--drop', '0.2', '--recovery-interval', '1'),
        *('--aa', 'rand-m9-mstd0.5', '--mixup-off-epoch', '2', '--class-balance'),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, method, count',
    [
        ('coretune', 'validate', 2),
        ('ema-plateau-accumulation', 'validate', 4),
        ('ema-plateau-accumulation', '_step', 15),
        ('contrast', '_step', 5),  # epochs have 3 steps in 2 updates
        ('updates-mixup-erasing', '_step', 5),
        ('updates-mixup-erasing', '_step', 8),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, data, monkeypatch, straight, name, method, count):
    flags = CONFIGURATIONS[name]
    expected = straight(*flags)
    with monkeypatch.context() as context:
        stop_at(context, method, count)
        folder = train(data, tmp_path, *flags)
    assert (folder / 'summary.csv').read_bytes() != (expected / 'summary.csv').read_bytes()
    assert train(data, tmp_path, *flags, '--resume', 'auto') == folder
    assert outcome(folder) == outcome(expected)
    states = [sorted(path.name for path in run.glob('*.pth.tar')) for run in (folder, expected)]
    assert states[0] == states[1]  # the same epochs are kept, and no recovery
    assert os.listdir(tmp_path) == ['run']


def test_the_plateau_is_one_in_the_run_that_is_compared(straight, read_csv):
    rows = read_csv(straight(*CONFIGURATIONS['ema-plateau-accumulation']) / 'summary.csv')
    assert len({row['lr'] for row in rows}) > 1


def test_a_continued_run_with_another_rate_says_so_and_uses_it(tmp_path, data, straight, caplog, read_csv):
    expected = straight()
    folder = copy_of(expected, tmp_path)
    train(data, tmp_path, '--lr', 0.025, '--resume', folder / 'checkpoint-1.pth.tar')
    assert 'other arguments than those of the state: lr 0.05 -> 0.025.' in caplog.text
    before, after = (read_csv(path / 'summary.csv') for path in (expected, folder))
    assert after[:2] == before[:2]
    for old, new in zip(before[2:], after[2:], strict=True):
        assert float(new['lr']) == pytest.approx(float(old['lr']) / 2)


def test_a_continued_run_with_the_same_arguments_has_nothing_to_say(tmp_path, data, straight, caplog):
    folder = copy_of(straight(), tmp_path)
    train(data, tmp_path, '--resume', folder / 'checkpoint-1.pth.tar')
    assert 'other arguments' not in caplog.text
    assert outcome(folder) == outcome(straight())


@pytest.mark.parametrize('flags', [[], ['--no-resume-opt']], ids=['whole', 'without-optimizer'])
def test_rows_after_the_state_are_dropped(tmp_path, data, monkeypatch, straight, read_csv, flags):
    folder = copy_of(straight(), tmp_path)
    assert len(read_csv(folder / 'summary.csv')) == 4
    stop_at(monkeypatch, '_step', 0)
    train(data, tmp_path, '--resume', folder / 'checkpoint-0.pth.tar', *flags)
    assert read_csv(folder / 'summary.csv') == read_csv(straight() / 'summary.csv')[:1]


def test_a_run_continued_without_its_optimizer_still_knows_its_best(tmp_path, data, straight, messages):
    path = copy_of(straight(), tmp_path) / 'checkpoint-2.pth.tar'
    state = torch.load(path, weights_only=False)
    state['run_state']['best'] = [101.0, 1]  # no epoch after this is better
    torch.save(state, path)
    train(data, tmp_path, '--resume', path, '--no-resume-opt')
    assert '*** Best metric: top1 101.00 % (epoch 1)' in messages()


def test_a_state_of_another_folder_starts_a_summary_of_its_own(tmp_path, data, straight, read_csv):
    folder = train(data, tmp_path, '--resume', straight() / 'checkpoint-2.pth.tar')
    assert read_csv(folder / 'summary.csv') == read_csv(straight() / 'summary.csv')[3:]


def test_resume_auto_without_a_state_starts_anew(tmp_path, data, straight, caplog):
    caplog.set_level(logging.INFO)
    folder = train(data, tmp_path, '--resume', 'auto')
    assert 'no state in' in caplog.text
    assert outcome(folder) == outcome(straight())


def resumed(state, no_resume_opt):
    torch.manual_seed(1)
    task = ClassificationTask(
        timm.create_model('test_resnet', num_classes=3), torch.nn.CrossEntropyLoss(), verbose=False
    )
    optimizer = timm.optim.create_optimizer_v2(task.get_trainable_module(), opt='momentum', lr=0.7, weight_decay=0.3)
    return task, optimizer, resume(str(state), task, optimizer, not no_resume_opt, {})


@pytest.mark.parametrize('no_resume_opt', [False, True])
def test_weights_are_resumed_with_the_optimizer_unless_told_otherwise(tmp_path, data, straight, no_resume_opt):
    folder = straight('--contrast-weight', 0, '--opt', 'momentum')
    state = torch.load(folder / 'checkpoint-2.pth.tar', weights_only=False)
    task, optimizer, continuation = resumed(folder / 'checkpoint-2.pth.tar', no_resume_opt)
    for name, value in task.get_eval_model().state_dict().items():
        assert torch.equal(value, state['state_dict'][name])
    assert bool(optimizer.state) == (not no_resume_opt)
    assert bool(continuation.loop_state) == (not no_resume_opt)
    assert (continuation.epoch, continuation.batch) == (3, 0)
    assert {group['lr'] for group in optimizer.param_groups} == {0.7}
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.0, 0.3}


def test_a_state_of_timm_goes_on_with_the_next_epoch(tmp_path, data, caplog, read_csv):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    task = ClassificationTask(
        timm.create_model('test_resnet', num_classes=3), torch.nn.CrossEntropyLoss(), verbose=False
    )
    optimizer = timm.optim.create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.05, weight_decay=2e-5)
    loss = task(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))['loss']
    loss.backward()
    optimizer.step()
    (tmp_path / 'timm').mkdir()
    args = argparse.Namespace(model='test_resnet', lr=0.05, epochs=4)
    saver = CheckpointSaver(
        task.get_eval_model(), optimizer, args, checkpoint_dir=str(tmp_path / 'timm'), task=task
    )  # fmt: skip
    saver.save_checkpoint(2, metric=50.0)
    flags = [flag for flag in FLAGS if flag != '--coretune']
    train(data, tmp_path, '--resume', tmp_path / 'timm' / 'last.pth.tar', base=flags)
    assert 'with epoch 3, batch 0' in caplog.text
    assert [row['epoch'] for row in read_csv(tmp_path / 'run' / 'summary.csv')] == ['3']
