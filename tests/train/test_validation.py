"""Validation in a run and alone, and the end of a run that gets no better"""

import csv
import json
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ranks import launch_ranks
from runs import results_of, train
from safetensors import safe_open
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from timm.task import ClassificationTask
from validation_worker import sorted_images

from timm_coretune.__main__ import main
from timm_coretune.train import Trainer
from timm_coretune.train.loop_config import LoopConfig


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
    results = tmp_path / 'results'
    words = ['evaluate', folder, data, '--metrics', 'confusion,per-class,ece', '--eval-output', results, '--workers', 0]
    AcceleratorState._reset_state(reset_partial_state=True)
    main([str(word) for word in (*words, '--device', 'cpu', '-b', 8)])
    assert json.loads((results / 'results.json').read_text()) == pytest.approx(result['validation'], rel=1e-5)
    for name in ('confusion.csv', 'per_class.csv'):
        assert (results / name).read_text() == (folder / name).read_text()
    assert 'eval_only: true' in (results / 'args.yaml').read_text()


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


@pytest.mark.parametrize('publish', ['better', 'ema'])
def test_the_better_of_the_weights_and_their_average_is_scored_and_published(
    publish, tiny, tmp_path, read_csv, messages
):
    # after 6 updates with the default decay the average is the weights after the first
    flags = ['--model-ema', '--model-ema-publish', publish, '--metrics', 'confusion', '--eval-metric', 'loss']
    folder = train(tiny, tmp_path, *flags, '--lr', 0.01, '--weight-decay', 0)
    lines = [re.findall(r'(Test.*?):.*Loss: +(\S+)', message) for message in messages()]
    losses = {name: float(loss) for found in lines for name, loss in found}
    assert losses['Test'] < losses['Test (EMA)']  # of the last epoch
    row = read_csv(folder / 'summary.csv')[-1]
    assert float(row['eval_loss']) == pytest.approx(losses['Test' if publish == 'better' else 'Test (EMA)'], abs=1e-3)
    kind = {'better': 'model', 'ema': 'ema'}[publish]
    with safe_open(folder / 'model_best.safetensors', 'pt') as f:
        assert f.metadata()['weights'] == kind
        state = torch.load(folder / 'last.pth.tar', weights_only=False)
        expected = state['state_dict' if kind == 'model' else 'state_dict_ema']
        assert all(torch.equal(f.get_tensor(name), expected[name]) for name in f.keys())  # noqa: SIM118
    assert any('The weights count, not' in message for message in messages()) == (publish == 'better')
    table = (folder / 'confusion.csv').read_text()
    again = tmp_path / 'again'
    flags = ['--eval-only', '--initial-checkpoint', folder / 'model_best.safetensors', '--metrics', 'confusion']
    (scores,) = results_of(tiny, again, *flags)
    assert scores['validation']['loss'] == pytest.approx(float(row['eval_loss']), rel=1e-5)
    rows = [[int(n) for n in line.split(',')[1:]] for line in table.splitlines()[1:]]
    assert 100 * sum(rows[i][i] for i in range(3)) / 12 == pytest.approx(scores['validation']['top1'])


def test_of_equal_scores_that_of_the_average_counts():
    task = ClassificationTask(torch.nn.Linear(1, 2), torch.nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    trainer = Trainer(task, optimizer, Accelerator(cpu=True), config=LoopConfig(eval_metric='top1'))
    batches = [(torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]))]
    weights, average = (task.get_trainable_module(), task.get_trainable_module(ema=True).module)
    right, wrong = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    for module in (weights, average):
        torch.nn.init.zeros_(module.bias)
    found = []
    for of_weights, of_average in ((right, wrong), (right, 2 * right), (wrong, right), (wrong, 2 * wrong)):
        weights.weight.data, average.weight.data = of_weights.clone(), of_average.clone()
        found.append((trainer.validator.evaluate(batches)['top1'], trainer.validator.ema_counts))
    assert found == [(100, False), (100, True), (100, True), (0, True)]


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
