"""Segmentation interrupted, and in two processes"""

import pytest
import torch
import torch.nn as nn
from commands import environment_with, in_two_processes, run_command
from paths import HELPERS, ROOT
from runs import stop_at
from segmentation_runs import FLAGS, last_row, read_counts, train, valid_pixels
from segmentation_train_worker import stay_in_eval

pytestmark = pytest.mark.slow

# interruptions

LONG = (
    *('--coretune', '--model-ema', '--model-ema-decay', '0.7', '-b', '2', '--epochs', '2', '--color-jitter', '0.3'),
    *('--recovery-interval', '1', '--sched-on-updates'),
)


@pytest.fixture(scope='module')
def straight(voc, tmp_path_factory):
    return train(voc, tmp_path_factory.mktemp('straight'), *LONG)


def test_a_run_interrupted_in_an_epoch_ends_with_the_bits_of_one_that_was_not(voc, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as context:
        stop_at(context, '_step', 6)  # two updates into the second epoch
        folder = train(voc, tmp_path, *LONG, '--workers', 1)
    assert (folder / 'recovery-1-1.pth.tar').exists()
    assert (folder / 'summary.csv').read_bytes() != (straight / 'summary.csv').read_bytes()
    assert train(voc, tmp_path, *LONG, '--workers', 1, '--resume', 'auto') == folder
    for name in ('summary.csv', 'model_best.safetensors', 'confusion.csv', 'per_class.csv', 'segmentation.json'):
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name
    a, b = (torch.load(path / 'last.pth.tar', weights_only=False) for path in (folder, straight))
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(a[key][name], b[key][name]) for name in b[key])
    assert not list(folder.glob('recovery-*'))


# processes


def test_two_processes_train_as_one_with_twice_the_batch_and_count_every_image_once(voc, tmp_path, monkeypatch):
    flags = ['--data-dir', voc, *FLAGS, '--coretune', '--epochs', 2, '--output', tmp_path]
    words = in_two_processes(HELPERS / 'segmentation_train_worker.py', *flags, '--experiment', 'two', '-b', 2)
    finished = run_command(words, environment_with(PYTHONPATH=str(ROOT)))
    assert 'Training with 2 process(es) on cpu' in finished.stderr
    for kind in (nn.BatchNorm2d, nn.Dropout):
        monkeypatch.setattr(kind, 'train', stay_in_eval)
    one = train(voc, tmp_path, '--coretune', '--epochs', 2)
    two = tmp_path / 'two'
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    # float32 sums in another order; a pixel at a tie may fall either way
    losses = ['train_loss', 'train_task', 'train_contrast', 'train_dense', 'eval_loss']
    assert [last_row(two)[name] for name in losses] == pytest.approx([last_row(one)[name] for name in losses], rel=1e-4)
    assert last_row(two)['eval_pa'] == pytest.approx(last_row(one)['eval_pa'], abs=0.1)
    assert read_counts(two).sum(1).tolist() == valid_pixels(voc, 'val').tolist()  # 3 images, one of them is repeated
