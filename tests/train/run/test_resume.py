"""States of a run: the newest intact one, damage, folders, full disks, and going on as if nothing had happened"""

import argparse
import logging
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import runs
import timm
import torch
from accelerate import Accelerator
from commands import environment_with, run_command
from paths import ROOT
from runs import SMALL, copy_of, stop_at
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_coretune.train.run.folder import find_newest_state, progress_of, read_state, take_folder
from timm_coretune.train.run.resume import RunState, resume


@pytest.fixture(scope='module')
def data(tiny_images):
    """12 training and 6 validation images of 3 classes."""
    return tiny_images((4, 4, 4), (2, 2, 2), names=['red', 'green', 'blue'], noise=120, tint=60)


FLAGS = (*SMALL, '-b', '4', '--epochs', '4', '--coretune', '--device', 'cpu')
train = partial(runs.train, base=FLAGS)


# which state


def write_state(path, epoch, batch, age=0):
    state = {'state_dict': {'w': torch.arange(4096.0)}, 'epoch': epoch, 'version': 2}
    torch.save({**state, 'run_state': {'epoch': epoch, 'batch': batch}}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return str(path)


def test_the_newest_state_is_the_one_that_got_farthest(tmp_path):
    assert find_newest_state(str(tmp_path)) is None
    assert find_newest_state(str(tmp_path / 'nowhere')) is None
    write_state(tmp_path / 'checkpoint-9.pth.tar', 1, 0)
    write_state(tmp_path / 'last.pth.tar', 2, 0, age=5)
    farthest = write_state(tmp_path / 'recovery-2-10.pth.tar', 2, 11, age=99)
    write_state(tmp_path / 'recovery-2-9.pth.tar', 2, 10)
    write_state(tmp_path / 'tmp.pth.tar', 7, 0)  # not in its place yet
    write_state(tmp_path / 'model_best.pth.tar', 8, 0)
    assert find_newest_state(str(tmp_path)) == farthest
    done = write_state(tmp_path / 'checkpoint-2.pth.tar', 3, 0, age=500)
    assert find_newest_state(str(tmp_path)) == done


def test_a_folder_whose_name_looks_like_a_pattern_is_searched(tmp_path):
    (tmp_path / 'run[1]*').mkdir()
    state = write_state(tmp_path / 'run[1]*' / 'last.pth.tar', 1, 0)
    assert find_newest_state(str(tmp_path / 'run[1]*')) == state


def cut(share):
    return lambda content: content[: int(share * len(content))]


def flip_in(pattern):
    def damage(content):
        place = content.index(pattern)
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return damage


@pytest.mark.parametrize(
    'damage',
    [
        *map(cut, (0.0, 0.01, 0.5, 0.9, 0.999)),
        flip_in(torch.tensor([2000.0, 2001.0]).numpy().tobytes()),
        flip_in(b'run_state'),
        lambda content: b'not a state\n',
        lambda content: bytes(len(content)),
    ],
    ids=['empty', 'cut-1%', 'cut-50%', 'cut-90%', 'cut-99.9%', 'bit-in-a-tensor', 'bit-in-a-name', 'text', 'zeros'],
)
def test_a_damaged_newest_state_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    before = write_state(tmp_path / 'checkpoint-0.pth.tar', 1, 0)
    newest = tmp_path / 'last.pth.tar'
    write_state(newest, 2, 0)
    assert find_newest_state(str(tmp_path)) == str(newest)
    newest.write_bytes(damage(newest.read_bytes()))
    assert find_newest_state(str(tmp_path)) == before
    (record,) = caplog.records
    assert record.levelname == 'WARNING'
    assert 'Passing over a damaged state' in record.message
    assert repr(str(newest)) in record.message


def test_a_file_of_weights_alone_is_no_state(tmp_path):
    torch.save({'w': torch.zeros(1)}, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='it holds no state_dict and epoch'):
        read_state(str(tmp_path / 'weights.pth'))


class _Foreign:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_a_state_that_would_run_code_is_refused_and_runs_none(tmp_path, data, caplog):
    (tmp_path / 'run').mkdir()
    path, trace = tmp_path / 'run' / 'last.pth.tar', tmp_path / 'trace'
    torch.save({'state_dict': {}, 'epoch': 1, 'extra': _Foreign(str(trace))}, path)
    with pytest.raises(ValueError, match=f'Expected a state of train.py in {str(path)!r}'):
        train(data, tmp_path, '--resume', path)
    assert find_newest_state(str(tmp_path / 'run')) is None
    assert not trace.exists()
    torch.load(path, weights_only=False)['extra'].close()
    assert trace.exists()  # it would have


def test_progress_of_a_state_of_timm_is_the_epoch_after_it():
    assert progress_of({'epoch': 3, 'version': 2}) == (4, 0)
    assert progress_of({'epoch': 3}) == (3, 0)
    assert progress_of({'epoch': 3, 'version': 2, 'run_state': {'epoch': 2, 'batch': 5}}) == (2, 5)


# which folder


def folder_args(output, experiment='run', resume=''):
    return argparse.Namespace(
        output=str(output), experiment=experiment, model='hf-hub:timm/test_resnet.r160_in1k', resume=resume
    )


@pytest.fixture
def take():
    locks = []

    def take(args, resumed=None):
        folder, lock = take_folder(args, 96, resumed)
        locks.append(lock)
        return os.path.basename(folder)

    yield take
    for lock in locks:
        lock.release()


def test_a_folder_that_holds_a_run_is_left_alone_and_the_next_is_numbered(tmp_path, take, caplog):
    assert take(folder_args(tmp_path)) == 'run'
    assert take(folder_args(tmp_path)) == 'run-1'  # this process holds the first, empty as it is
    assert "run' holds a run already, this one goes to" in caplog.text
    (tmp_path / 'run-2').mkdir()
    (tmp_path / 'run-2' / 'args.yaml').write_text('')  # a run that is over
    assert take(folder_args(tmp_path)) == 'run-3'
    assert take(folder_args(tmp_path, 'other')) == 'other'


def test_the_default_name_is_that_of_timm(tmp_path, take):
    assert take(folder_args(tmp_path, ''))[15:] == '-timm_test_resnet_r160_in1k-96'


@pytest.fixture
def holder(tmp_path):
    """Another process that writes tmp_path/run."""
    (tmp_path / 'run').mkdir()
    code = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.flock(f, fcntl.LOCK_EX); print(1); sys.stdin.read()'
    command = [sys.executable, '-u', '-c', code, str(tmp_path / 'run' / '.lock')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'1\n'
        yield process
        process.kill()


def test_a_folder_that_another_process_writes_is_neither_continued_nor_shared(tmp_path, holder, take):
    state = str(tmp_path / 'run' / 'last.pth.tar')
    with pytest.raises(ValueError, match=r"Another run writes '.*run' at this moment\. Wait for it, or choose"):
        take(folder_args(tmp_path), state)
    with pytest.raises(ValueError, match='Another run writes'):
        take(folder_args(tmp_path, resume='auto'))
    assert take(folder_args(tmp_path)) == 'run-1'
    holder.kill()
    holder.wait()
    assert take(folder_args(tmp_path), state) == 'run'


def test_a_state_of_elsewhere_does_not_open_a_folder_that_holds_a_run(tmp_path, take):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'args.yaml').write_text('')
    assert take(folder_args(tmp_path), str(tmp_path / 'elsewhere' / 'last.pth.tar')) == 'run-1'
    assert take(folder_args(tmp_path), str(tmp_path / 'run' / 'last.pth.tar')) == 'run'


def test_a_run_that_was_stopped_before_its_first_epoch_ended_starts_anew_in_its_folder(tmp_path, take):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'args.yaml').write_text('')
    assert take(folder_args(tmp_path, resume='auto')) == 'run'
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'summary.csv').write_text('')  # its states are gone or damaged, not its results
    assert take(folder_args(tmp_path, 'other', resume='auto')) == 'other-1'


def test_a_folder_that_cannot_be_made_is_named(tmp_path, take):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=r"Expected to write the run into '.*file/run'.*Choose another .* --output"):
        take(folder_args(tmp_path / 'file'))


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
        except OSError as e:
            print(f'{name}: {e}')
"""


def test_a_full_disk_leaves_the_state_before_and_says_where_it_is(tmp_path, data, read_csv, straight):
    # the loss falls in every epoch, so that weights are due each time
    flags = [*FLAGS, '--data-dir', str(data), '--output', str(tmp_path), '--eval-metric', 'loss', '--lr', '0.001']
    command = [sys.executable, '-c', textwrap.dedent(FULL_DISK), *flags]
    finished = run_command(command, environment_with(PYTHONPATH=str(ROOT)), check=False)
    said = dict(
        line.split(': ', 1) for line in finished.stdout.splitlines() if line[:7] in ('weights', 'state: ', 'summary')
    )
    assert set(said) == {'weights', 'state', 'summary'}, finished.stderr
    for name, message in said.items():
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


@pytest.fixture(scope='module')
def straight(data, tmp_path_factory):
    """The folder of an uninterrupted run with these flags."""
    folders = {}

    def run(*flags):
        if flags not in folders:
            folders[flags] = train(data, tmp_path_factory.mktemp('straight'), *flags)
        return folders[flags]

    return run


def outcome(folder):
    return {name: (folder / name).read_bytes() for name in ('summary.csv', 'model_best.safetensors')}


CONFIGURATIONS = {
    'coretune': [],
    'ema-plateau-accumulation': [
        *('--model-ema', '--model-ema-decay', '0.7', '--sched', 'plateau', '--patience-epochs', '0', '--decay-rate'),
        *('0.5', '-b', '2', '--grad-accum-steps', '2', '--opt', 'adamw', '--lr', '0.003', '--recovery-interval', '1'),
        *('--metrics', 'ece', '--eval-metric', 'ece', '--head-lr-scale', '3', '--freeze-epochs', '1'),
    ],
    'updates-mixup-erasing': [
        *('--sched-on-updates', '--mixup', '0.5', '--reprob', '0.5', '--drop', '0.2', '--recovery-interval', '1'),
        *('--aa', 'rand-m9-mstd0.5', '--mixup-off-epoch', '2', '--class-balance'),
    ],
}


@pytest.mark.parametrize(
    'name, method, count',
    [
        ('coretune', 'validate', 2),
        ('ema-plateau-accumulation', 'validate', 4),
        ('ema-plateau-accumulation', '_step', 15),
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
    assert not list(folder.glob('recovery-*'))
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
    args = argparse.Namespace(no_resume_opt=no_resume_opt, start_epoch=None)
    run_state = RunState(Accelerator(cpu=True))
    resume(args, str(state), task, optimizer, run_state)
    return args, task, optimizer, run_state


@pytest.mark.parametrize('no_resume_opt', [False, True])
def test_weights_are_resumed_with_the_optimizer_unless_told_otherwise(tmp_path, data, straight, no_resume_opt):
    folder = straight('--contrast-weight', 0, '--opt', 'momentum')
    state = torch.load(folder / 'checkpoint-2.pth.tar', weights_only=False)
    args, task, optimizer, run_state = resumed(folder / 'checkpoint-2.pth.tar', no_resume_opt)
    for name, value in task.get_eval_model().state_dict().items():
        assert torch.equal(value, state['state_dict'][name])
    assert bool(optimizer.state) == (not no_resume_opt)
    assert bool(run_state.values) == (not no_resume_opt)
    assert args.start_epoch == (3 if no_resume_opt else None)
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
