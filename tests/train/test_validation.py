"""Validation in a run and alone, and the end of a run that gets no better"""

import csv
from functools import partial

import pytest
import runs
from runs import SMALL

NAMES = ['ant', 'bee', 'cat', 'dog', 'elk']


@pytest.fixture
def data(tiny_images):
    """24 training and 9 validation images: 12, 9, 2 and 1 of each class, and 3, 3, 2 and 1."""
    return tiny_images((12, 9, 2, 1), (3, 3, 2, 1), names=NAMES[:4])


FLAGS = (*SMALL, '-b', '8', '--device', 'cpu')

train = partial(runs.train, base=FLAGS)


def test_validation_alone_repeats_the_metrics_of_the_epoch_it_loads(data, tmp_path, read_csv):
    flags = ['--coretune', '--epochs', 1, '--metrics', 'confusion,per-class,ece']
    (result,) = runs.results_of(data, tmp_path, *flags, base=FLAGS)
    folder = tmp_path / 'run'
    (row,) = read_csv(folder / 'summary.csv')
    assert {key: float(row[f'eval_{key}']) for key in result['validation']} == pytest.approx(result['validation'])
    assert set(result['validation']) == {'loss', 'top1', 'top5', 'macro_f1', 'ece'}
    assert sum(int(n) for r in csv.reader((folder / 'confusion.csv').open()) for n in r[1:] if n.isdigit()) == 9
    assert (folder / 'confusion.png').exists()
    files = sorted(tmp_path.rglob('*'))
    for flag in (['--eval-only'], ['--epochs', 0]):
        flags = [*flag, '--initial-checkpoint', folder / 'model_best.safetensors', '--metrics', 'per-class,ece']
        (again,) = runs.results_of(data, tmp_path, *flags, base=FLAGS)
        assert again['validation'] == pytest.approx(result['validation'], rel=1e-5)
    assert sorted(tmp_path.rglob('*')) == files


def test_validation_alone_takes_the_flags_of_a_training_run(data, tmp_path):
    train(
        data, tmp_path, '--eval-only', '--train-img-sizes', 32, 48, '--coretune', '--freeze-epochs', 1, '--mixup', 0.1
    )
    assert not (tmp_path / 'run').exists()


def test_without_validation_no_metrics_are_written(data, tmp_path):
    train(data, tmp_path, '--epochs', 1, '--val-split', '', '--metrics', 'confusion,per-class')
    assert (tmp_path / 'run' / 'model_best.safetensors').exists()
    assert not list((tmp_path / 'run').glob('con*.csv'))


def test_a_run_that_gets_no_better_stops(data, tmp_path, read_csv, messages):
    train(data, tmp_path, '--epochs', 9, '--patience', 2, '--lr', 1e-30)
    assert [row['epoch'] for row in read_csv(tmp_path / 'run' / 'summary.csv')] == ['0', '1', '2']
    assert 'No better top1 in 2 validations: stopping.' in messages()
