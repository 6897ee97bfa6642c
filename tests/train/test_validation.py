"""Validation in a run and alone, and the end of a run that gets no better"""

import csv

import pytest
from ranks import launch_ranks
from runs import results_of, train
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from validation_worker import sorted_images


def test_validation_alone_repeats_the_metrics_of_the_epoch_it_loads(data, tmp_path, read_csv):
    flags = ['--coretune', '--epochs', 1, '--metrics', 'confusion,per-class,ece']
    (result,) = results_of(data, tmp_path, *flags)
    folder = tmp_path / 'run'
    (row,) = read_csv(folder / 'summary.csv')
    assert {key: float(row[f'eval_{key}']) for key in result['validation']} == pytest.approx(result['validation'])
    assert set(result['validation']) == {'loss', 'top1', 'top5', 'macro_f1', 'ece'}
    assert sum(int(n) for r in csv.reader((folder / 'confusion.csv').open()) for n in r[1:] if n.isdigit()) == 9
    assert (folder / 'confusion.png').exists()
    files = sorted(tmp_path.rglob('*'))
    for flag in (['--eval-only'], ['--epochs', 0]):
        flags = [*flag, '--initial-checkpoint', folder / 'model_best.safetensors', '--metrics', 'per-class,ece']
        (again,) = results_of(data, tmp_path, *flags)
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


@pytest.mark.slow
def test_two_processes_count_each_image_once_whatever_the_loader(tmp_path):
    images, labels = sorted_images().tensors
    logits = images.flatten(1)
    predicted = logits.argmax(dim=1)
    matrix = confusion_matrix(labels, predicted).tolist()
    expected = {
        'top1': 100 * accuracy_score(labels, predicted),
        'macro_f1': 100 * f1_score(labels, predicted, average='macro'),
        'loss': log_loss(labels, logits.double().softmax(dim=1)),
    }
    for found in launch_ranks('validation_worker.py', 2, tmp_path):
        assert len(found) == 7
        for name, (scores, counts) in found.items():
            assert counts == matrix, name
            assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-5), name
            assert scores['ece'] == pytest.approx(found['plain'][0]['ece'], rel=1e-5), name
