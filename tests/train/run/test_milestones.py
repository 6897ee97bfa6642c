"""A run stops after --stop-epoch with its schedule as it is, and keeps the states of --save-epochs"""

from functools import partial

import pytest
import runs
from runs import ON_CPU, outcome, rows_of

from timm_coretune.train.run.folder import progress_of, read_state

FLAGS = (*ON_CPU, '-b', '4', '--epochs', '4', '--coretune', '--eval-metric', 'loss')
train = partial(runs.train, base=FLAGS)


@pytest.fixture(scope='module')
def data(tiny_images):
    """12 training and 6 validation images of 3 classes."""
    return tiny_images((4, 4, 4), (2, 2, 2), names=['red', 'green', 'blue'], noise=120, tint=60)


def epochs_of(folder):
    return [int(row['epoch']) for row in rows_of(folder / 'summary.csv')]


def place_of(path):
    return progress_of(read_state(path))


def test_a_run_stops_keeps_states_and_goes_on_to_the_same_end(tmp_path, data, straight, messages):
    flags = ('--val-interval', '2', '--save-epochs', '1', '2')
    folder = train(data, tmp_path, *flags, '--stop-epoch', '3')
    assert epochs_of(folder) == [0, 1, 2]  # validated by --save-epochs, --val-interval and --stop-epoch
    assert place_of(folder / 'milestone-1.pth.tar') == (1, 0)
    assert place_of(folder / 'milestone-2.pth.tar') == (2, 0)
    assert place_of(folder / 'last.pth.tar') == (3, 0)
    assert sorted(path.name for path in folder.glob('milestone-*')) == ['milestone-1.pth.tar', 'milestone-2.pth.tar']
    assert 'Training stops after 3 of 4 epochs. --resume auto trains the rest.' in messages()
    train(data, tmp_path, *flags, '--stop-epoch', '3', '--resume', 'auto')
    assert 'This run has trained 3 of 4 epochs, after which --stop-epoch stops it' in '\n'.join(messages())
    train(data, tmp_path, *flags, '--resume', 'auto')
    whole = train(data, tmp_path / 'whole', *flags)
    assert epochs_of(folder) == [0, 1, 2, 3]
    assert epochs_of(whole) == [0, 1, 3]
    assert outcome(folder)['model_best.safetensors'] == outcome(whole)['model_best.safetensors']
    assert rows_of(folder / 'summary.csv')[3] == rows_of(whole / 'summary.csv')[2]


def test_another_run_branches_off_at_a_kept_state(tmp_path, data, straight):
    trunk = straight('--save-epochs', '2')
    branch = train(data, tmp_path, '--resume', trunk / 'milestone-2.pth.tar')
    assert epochs_of(branch) == [2, 3]
    assert [rows_of(folder / 'summary.csv')[-1] for folder in (trunk, branch)] == [
        rows_of(trunk / 'summary.csv')[3]
    ] * 2  # fmt: skip


def test_a_state_that_a_kill_left_out_is_kept_when_the_run_goes_on(tmp_path, data):
    folder = train(data, tmp_path, '--save-epochs', '2', '--stop-epoch', '2')
    (folder / 'milestone-2.pth.tar').unlink()
    train(data, tmp_path, '--save-epochs', '2', '--resume', 'auto')
    assert place_of(folder / 'milestone-2.pth.tar') == (2, 0)


def test_a_schedule_of_timm_that_decays_at_the_end_ends_at_its_lowest_rate(tmp_path, data):
    flags = ('--sched', 'wsd', '--warmup-epochs', '0', '--sched-on-updates', '--decay-epochs', '1', '--lr', '0.01')
    folder = train(data, tmp_path, *flags, '--lr-decay-fn', 'linear', '--cooldown-epochs', '1')
    rates = [float(row['lr']) for row in rows_of(folder / 'summary.csv')]
    assert rates[:3] == [0.01] * 3
    assert rates[3:] == [0.0, 0.0]


@pytest.mark.parametrize('flags', ['--stop-epoch 5', '--save-epochs 2 5'])
def test_a_number_behind_the_schedule_is_refused(tmp_path, data, flags):
    flag = flags.split()[0]
    with pytest.raises(ValueError, match=f'{flag}: expected at most 4, the epochs of the schedule, got 5'):
        train(data, tmp_path, *flags.split())
