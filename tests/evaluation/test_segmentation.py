"""Scores of a segmentation against scikit-learn and loops over pixels, over batches and processes"""

import csv
import math

import pytest
import torch
from ranks import launch_ranks
from segmentation_evaluator_worker import IGNORED, NUM_CLASSES, batches
from sklearn.metrics import confusion_matrix, jaccard_score

from timm_coretune.evaluation.segmentation import SegmentationEvaluator
from timm_coretune.report.plots import plot_confusion

NAMES = ['sky', 'road', 'car', 'tree']
KEYS = ['loss', 'pa', 'mpa', 'miou', 'fwiou']


def evaluate(data, **kwargs):
    evaluator = SegmentationEvaluator(NUM_CLASSES, **kwargs)
    for output, target in data:
        evaluator.update(output, target)
    return evaluator, evaluator.compute()


def counted_pixels():
    """True and predicted classes of the pixels that count, and their logits."""
    true, predicted, logits = [], [], []
    for output, target in batches():
        for row, label in zip(output.permute(0, 2, 3, 1).reshape(-1, NUM_CLASSES).tolist(), target.flatten().tolist()):  # noqa: B905
            if label != IGNORED:
                true.append(label)
                predicted.append(row.index(max(row)))
                logits.append(row)
    return true, predicted, logits


def scores_by_hand(true, predicted):
    """PA, MPA, mIoU and FWIoU in percent, by a loop over the pixels for every class."""
    pixels = list(zip(true, predicted, strict=True))
    accuracies, ious, weighted = [], [], 0.0
    for c in range(NUM_CLASSES):
        both = sum(t == c and p == c for t, p in pixels)
        of_class = sum(t == c for t, _ in pixels)
        either = sum(t == c or p == c for t, p in pixels)
        accuracies += [both / of_class] if of_class else []
        ious += [both / either] if either else []
        weighted += of_class * both / either / len(pixels) if either else 0.0
    right = sum(t == p for t, p in pixels) / len(pixels)
    means = (sum(accuracies) / len(accuracies), sum(ious) / len(ious))
    return [100 * score for score in (right, *means, weighted)]


def test_the_matrix_and_iou_are_those_of_scikit_learn():
    true, predicted, _ = counted_pixels()
    assert 4 in predicted  # the data has what the rules are about
    assert not {4, 5} & set(true)
    assert 5 not in predicted
    evaluator, metrics = evaluate(batches())
    labels = range(NUM_CLASSES)
    assert evaluator.matrix.dtype == torch.int64
    assert evaluator.matrix.tolist() == confusion_matrix(true, predicted, labels=labels).tolist()
    iou = jaccard_score(true, predicted, labels=labels, average=None, zero_division=0)
    rows = evaluator.per_class()
    assert [row['iou'] for row in rows[:5]] == pytest.approx([100 * value for value in iou[:5]])
    assert rows[4]['iou'] == 0  # predicted, but nowhere there
    assert [math.isnan(row['iou']) for row in rows] == [False] * 5 + [True]
    assert [math.isnan(row['accuracy']) for row in rows] == [False] * 4 + [True] * 2
    macro = jaccard_score(true, predicted, labels=range(5), average='macro')
    assert metrics['miou'] == pytest.approx(100 * macro)
    weighted = jaccard_score(true, predicted, labels=labels, average='weighted', zero_division=0)
    assert metrics['fwiou'] == pytest.approx(100 * weighted)


def test_scores_are_those_of_loops_over_the_pixels():
    true, predicted, logits = counted_pixels()
    _, metrics = evaluate(batches())
    assert list(metrics) == KEYS
    assert [metrics[key] for key in KEYS[1:]] == pytest.approx(scores_by_hand(true, predicted))
    losses = [
        math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(logits, true, strict=True)
    ]  # fmt: skip
    assert metrics['loss'] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize('ignore_index', [-100, 254], ids=['negative', 'other'])
def test_the_ignored_index_is_free(ignore_index):
    _, expected = evaluate(batches())
    moved = [(output, target.where(target != IGNORED, ignore_index)) for output, target in batches()]
    assert evaluate(moved, ignore_index=ignore_index)[1] == expected


def test_what_is_predicted_at_ignored_pixels_is_of_no_account():
    _, expected = evaluate(batches())
    changed = [(output.where(target[:, None] != IGNORED, 7.0), target) for output, target in batches()]
    assert evaluate(changed)[1] == expected


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_logits_of_any_dtype_are_scored_as_their_values_are(dtype):
    rounded = [(output.to(dtype), target.int()) for output, target in batches()]
    _, expected = evaluate([(output.float(), target) for output, target in rounded])
    assert evaluate(rounded)[1] == pytest.approx(expected, rel=1e-6)


def test_without_a_pixel_that_counts_all_is_0():
    output, target = next(batches())
    for data in ([(output, torch.full_like(target, IGNORED))], [(output[:0], target[:0])]):
        evaluator, metrics = evaluate(data)
        assert metrics == dict.fromkeys(KEYS, 0.0)
        for row in evaluator.per_class():
            assert row['pixels'] == 0
            assert math.isnan(row['iou'])
            assert math.isnan(row['accuracy'])


def test_a_nan_in_the_logits_is_not_hidden():
    output, target = next(batches())
    output[0, 0, 0, :] = float('nan')
    assert math.isnan(evaluate([(output, target)])[1]['loss'])


def test_small_losses_are_not_lost_in_a_large_sum():
    evaluator = SegmentationEvaluator(2)
    for logit, times in ((-1e8, 1), (1e-3, 50)):
        output = torch.zeros(1, 2, 1, 1)
        output[:, 0] = logit
        for _ in range(times):
            evaluator.update(output, torch.zeros(1, 1, 1).long())
    expected = (1e8 + 50 * math.log(1 + math.exp(-1e-3))) / 51
    assert evaluator.compute()['loss'] == pytest.approx(expected, rel=1e-9)


def test_reset_forgets_and_order_does_not_matter():
    evaluator, expected = evaluate(batches())
    evaluator.reset()
    with pytest.raises(RuntimeError, match='before compute'):
        evaluator.per_class()
    for output, target in reversed(list(batches())):
        evaluator.update(output, target)
    assert evaluator.compute() == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path):
    evaluator, metrics = evaluate(batches())
    for found in launch_ranks('segmentation_evaluator_worker.py', 2, tmp_path):
        assert found['metrics'] == pytest.approx(metrics, rel=1e-6)
        assert found['matrix'] == evaluator.matrix.tolist()


def test_tables_are_written_whole_and_become_a_picture(tmp_path):
    evaluator, _ = evaluate(batches(), class_names=NAMES)
    evaluator.write(str(tmp_path))
    names = [*NAMES, '4', '5']  # those that are not known are numbers
    header, *rows = csv.reader((tmp_path / 'confusion.csv').open())
    assert header == ['true / predicted', *names]
    assert [[name, *map(str, row)] for name, row in zip(names, evaluator.matrix.tolist(), strict=True)] == rows
    rows = list(csv.DictReader((tmp_path / 'per_class.csv').open()))
    written = [{key: str(value).replace('nan', '') for key, value in row.items()} for row in evaluator.per_class()]
    assert rows == written
    assert [row['accuracy'] == '' for row in rows] == [False] * 4 + [True] * 2
    assert list(rows[0]) == ['class', 'iou', 'accuracy', 'pixels']
    recall = [100 * row[i] / sum(row) for i, row in enumerate(evaluator.matrix.tolist()) if sum(row)]
    assert [float(row['accuracy']) for row in rows if row['accuracy']] == pytest.approx(recall)
    assert [int(row['pixels']) for row in rows] == [sum(row) for row in evaluator.matrix.tolist()]
    plot_confusion(str(tmp_path / 'confusion.csv'), str(tmp_path / 'confusion.png'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['confusion.csv', 'confusion.png', 'per_class.csv']


def test_a_log_line_names_every_score():
    _, metrics = evaluate(batches())
    words = SegmentationEvaluator.describe(metrics).split()
    assert words[::2] == ['Loss:', 'PA:', 'MPA:', 'mIoU:', 'FWIoU:']
    assert [float(word) for word in words[1::2]] == pytest.approx(list(metrics.values()), abs=5e-4)


@pytest.mark.parametrize(
    'output_shape, target_shape, value, message',
    [
        ((2, 6, 4, 4), (2, 8, 8), 0, r'got \(2, 6, 4, 4\) and \(2, 8, 8\). Resize the logits'),
        ((2, 5, 4, 4), (2, 4, 4), 0, r'Expected logits \(batch_size, 6,'),
        ((2, 6, 4, 4), (2, 1, 4, 4), 0, 'Resize the logits'),
        ((2, 6, 4, 4), (2, 4, 4), 6, r'in \[0, 5\] or 255 for pixels to ignore, got \[6\]'),
        ((2, 6, 4, 4), (2, 4, 4), -1, r'got \[-1\]'),
    ],
    ids=['size', 'classes', 'channel', 'too-high', 'negative'],
)
def test_what_does_not_fit_is_refused(output_shape, target_shape, value, message):
    evaluator = SegmentationEvaluator(NUM_CLASSES)
    with pytest.raises(ValueError, match=message):
        evaluator.update(torch.zeros(output_shape), torch.full(target_shape, value))
