"""Which state of a run is the newest intact one, and which folder a run may write"""

import os
import subprocess
import sys

import pytest
import torch
from runs import train

from timm_coretune.train.cli.settings import OutputSettings
from timm_coretune.train.run.folder import default_name, find_newest_state, progress_of, read_state, take_folder
from timm_coretune.train.run.saver import Saver

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


@pytest.mark.parametrize('name', ['tmp.pth.tar', 'recovery_tmp.pth.tar'])
def test_a_state_is_not_written_through_a_link_that_somebody_left(tmp_path, name):
    model = torch.nn.Linear(1, 1)
    saver = Saver(
        model, torch.optim.SGD(model.parameters(), 0.1), checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    (tmp_path / name).symlink_to(victim)
    saver.save_recovery(0, 3) if name.startswith('recovery') else saver.save_checkpoint(0, 1.0)
    assert victim.read_text() == 'mine'
    assert not (tmp_path / name).is_symlink()
    assert list(tmp_path.glob('recovery-0-3.pth.tar' if name.startswith('recovery') else 'checkpoint-0.pth.tar'))


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
        train(data, tmp_path, '--coretune', '--resume', path)
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
    return OutputSettings(output=str(output), experiment=experiment, resume=resume)


@pytest.fixture
def take():
    locks = []

    def take(settings, resumed=None):
        name = default_name('hf-hub:timm/test_resnet.r160_in1k', 96)
        folder, lock = take_folder(settings, name, resumed)
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
