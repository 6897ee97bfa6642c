"""With --global-batch-size a run has the same batches on any number of processes, also if that changes on the way"""

import pytest
import torch
from ranks import launch_ranks
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset
from train_flags import flat

from timm_coretune.data.resumable import make_resumable
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.settings import Settings
from timm_coretune.train.processes import share_batch
from timm_coretune.train.run.place import _ORDER

# dtype, and whether batches are balanced, with the relative difference of weights that rounding may make
RUNS = {(torch.float32, False): 1e-6, (torch.float64, False): 1e-12, (torch.float64, True): 1e-12}


def run_parts(directory, parts):
    """Train all runs in parts, each with its number of processes until an epoch and update.

    Returns what every update of each run saw, and the end of each.
    """
    seen, states, before = {run: [] for run in RUNS}, dict.fromkeys(RUNS), None
    for number, (num_processes, until) in enumerate(parts):
        folder = directory / f'part{number}'
        folder.mkdir(parents=True)
        job = dict(num_processes=num_processes, until=until, states=states, before=before, order=_ORDER)
        torch.save(job, folder / 'job.pt')
        found = launch_ranks('global_batch_worker.py', num_processes, folder)[0]
        for run in RUNS:
            seen[run] += found[run]['seen']
        states, before = {run: found[run]['state'] for run in RUNS}, num_processes
    return seen, found


@pytest.mark.slow
def test_one_and_two_processes_in_one_run_see_the_batches_of_one_and_train_the_same_weights(tmp_path):
    whole, end = run_parts(tmp_path / 'whole', [(1, None)])
    changing, end_of_changing = run_parts(tmp_path / 'changing', [(1, (0, 2)), (2, (1, 3)), (1, None)])
    for run, rtol in RUNS.items():
        assert len(whole[run]) == 3 * (43 // 8)  # images that do not fill a batch are left out
        assert len(changing[run]) == len(whole[run])
        for ours, theirs in zip(changing[run], whole[run], strict=True):
            assert torch.equal(ours, theirs)  # the same images in the same order, augmented alike
        ours, theirs = end_of_changing[run], end[run]
        assert ours['losses'][-1] == pytest.approx(theirs['losses'][-1], rel=1e-6)  # meters are float32
        for name, weight in theirs['weights'].items():
            assert (ours['weights'][name] - weight).norm() <= rtol * weight.norm(), (run, name)


def settings_of(*words):
    return parse_args(['--data-dir', '.', *words]).settings


@pytest.mark.parametrize('total, num_processes, size', [(64, 1, 64), (64, 2, 32), (6, 3, 2)])
def test_processes_have_equal_shares(total, num_processes, size):
    assert share_batch(settings_of('--global-batch-size', str(total)), num_processes).data.batch_size == size


def test_without_the_flag_nothing_changes():
    settings = settings_of('-b', '7')
    assert share_batch(settings, 3) is settings


@pytest.mark.parametrize(
    'words, num_processes, message',
    [
        ('--global-batch-size 64', 3, 'expected a multiple of the 3 processes, got 64. Choose 63 or 66.'),
        ('--global-batch-size 2', 4, 'expected a multiple of the 4 processes, got 2. Choose 4 or 8.'),
        ('--global-batch-size 6 --class-balance', 2, 'is 3 each; --class-balance needs a number of 4 or more'),
        ('--global-batch-size 6 --mixup 0.2', 2, 'is 3 each; --mixup or --cutmix needs an even number of 2 or more'),
    ],
)
def test_shares_that_do_not_fit_are_refused(words, num_processes, message):
    with pytest.raises(ValueError, match=message):
        share_batch(settings_of(*words.split()), num_processes)


def test_one_of_the_two_sizes_is_given(capsys):
    with pytest.raises(SystemExit):
        parse_args(['--global-batch-size', '64', '-b', '32'])
    assert 'argument --global-batch-size: it is shared out to the processes' in capsys.readouterr().err


def test_the_saved_settings_repeat_the_run_on_another_number_of_processes(tmp_path):
    (tmp_path / 'args.yaml').write_text(parse_args(['--global-batch-size', '64']).text)
    again = flat(['-c', str(tmp_path / 'args.yaml')])
    assert again.global_batch_size == 64
    assert share_batch(Settings.from_flat(vars(again)), 4).data.batch_size == 16


@pytest.mark.parametrize('num_images', [40, 41, 47, 48])
@pytest.mark.parametrize('num_processes', [1, 2, 4])
def test_an_epoch_has_as_many_batches_on_any_number_of_processes(num_images, num_processes):
    dataset = TensorDataset(torch.arange(num_images))
    order = RandomSampler(dataset) if num_processes == 1 else DistributedSampler(dataset, num_processes, 0)
    loader = make_resumable(
        DataLoader(dataset, batch_sampler=BatchSampler(order, 8 // num_processes, True)), 42, 0, num_processes
    )
    assert len(loader) == len(list(loader)) == num_images // 8
