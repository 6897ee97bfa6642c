"""Scores of images beyond top-k: against scikit-learn, and as tables and pictures"""

import csv
import math
import sys

import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from timm_coretune.evaluation.classification import ClassificationEvaluator
from timm_coretune.report.plots import plot_confusion

NAMES = ['ant', 'bee', 'cat', 'dog', 'elk']


@pytest.fixture
def predictions():
    """Logits and labels of 90 images of 5 classes; no image is of the last, and none is taken for the second."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(4, (90,), generator=generator)
    output = 2 * torch.randn(90, 5, generator=generator)
    output[torch.arange(90), target] += 2
    output[:, 1] -= 100
    return output, target


def measure(names, predictions, class_names=NAMES):
    metrics = ClassificationEvaluator(None, names, 5, class_names)
    metrics.update(predictions[0][:7].flip(1), predictions[1][:7])
    metrics.reset()  # forgets them
    for part in (slice(0, 32), slice(32, 64), slice(64, 90)):
        metrics.update(predictions[0][part], predictions[1][part])
    scores = metrics.compute()
    return metrics, {name: scores[name] for name in scores if name not in ('loss', 'top1', 'top5')}


def test_confusion_and_scores_of_each_class_are_those_of_scikit_learn(predictions):
    output, target = predictions
    metrics, scalars = measure(['confusion', 'per-class'], predictions)
    predicted = output.argmax(1)
    assert metrics.matrix.tolist() == confusion_matrix(target, predicted, labels=range(5)).tolist()
    expected = precision_recall_fscore_support(target, predicted, labels=range(5), zero_division=math.nan)
    rows = metrics.per_class()
    for key, values, scale in zip(('precision', 'recall', 'f1', 'support'), expected, (100, 100, 100, 1), strict=True):
        assert [row[key] for row in rows] == pytest.approx([scale * value for value in values], nan_ok=True)
    assert math.isnan(rows[1]['precision'])  # never predicted
    assert math.isnan(rows[4]['recall'])  # not there
    assert [row['class'] for row in rows] == NAMES
    present = sorted(set(target.tolist()))
    assert present == [0, 1, 2, 3]
    macro_f1 = 100 * f1_score(target, predicted, labels=present, average='macro', zero_division=0)
    assert scalars == {'macro_f1': pytest.approx(macro_f1)}


def ece_by_hand(output, target):
    bins = [[] for _ in range(15)]
    for row, label in zip(output.tolist(), target.tolist(), strict=True):
        exps = [math.exp(x - max(row)) for x in row]
        confidence = max(exps) / sum(exps)
        bins[min(int(15 * confidence), 14)].append((confidence, row.index(max(row)) == label))
    gaps = [abs(sum(c for c, _ in b) - sum(right for _, right in b)) for b in bins if b]
    return 100 * sum(gaps) / len(target)


def test_calibration_error_is_the_mean_gap_of_15_bins(predictions):
    _, scalars = measure(['ece'], predictions)
    assert scalars == {'ece': pytest.approx(ece_by_hand(*predictions), rel=1e-5)}
    assert scalars['ece'] > 1


def test_metrics_are_written_as_tables(tmp_path, predictions):
    metrics, _ = measure(['confusion', 'per-class', 'ece'], predictions, NAMES[:3])
    metrics.write(str(tmp_path))
    names = [*NAMES[:3], '3', '4']  # those that are not known are numbers
    header, *rows = csv.reader((tmp_path / 'confusion.csv').open())
    assert header == ['true / predicted', *names]
    assert [[name, *map(str, row)] for name, row in zip(names, metrics.matrix.tolist(), strict=True)] == rows
    rows = list(csv.DictReader((tmp_path / 'per_class.csv').open()))
    assert [row['class'] for row in rows] == names
    recall = [row['recall'] for row in metrics.per_class()]
    assert [row['recall'] for row in rows] == [*map(str, recall[:4]), '']  # no image is of the last
    assert sorted(path.name for path in tmp_path.iterdir()) == ['confusion.csv', 'per_class.csv']


def test_only_what_was_asked_for_is_measured_and_written(tmp_path, predictions):
    metrics, scalars = measure(['confusion'], predictions)
    metrics.write(str(tmp_path))
    assert scalars == {}
    assert [path.name for path in tmp_path.iterdir()] == ['confusion.csv']


def test_missing_torchmetrics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchmetrics.classification', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-coretune\[metrics\]'"):
        ClassificationEvaluator(None, ['ece'], 5, None)


def test_a_confusion_matrix_becomes_a_picture(tmp_path, predictions):
    metrics, _ = measure(['confusion'], predictions)
    metrics.write(str(tmp_path))
    plot_confusion(str(tmp_path / 'confusion.csv'), str(tmp_path / 'confusion.png'))
    picture = Image.open(tmp_path / 'confusion.png')
    assert picture.format == 'PNG'
    assert min(picture.size) > 200
    assert len(set(picture.convert('L').tobytes())) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['confusion.csv', 'confusion.png']
