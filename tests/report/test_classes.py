"""Confusion and scores of classes are those of the counts, worst first, and what is left out is said"""

import numpy as np
import pytest
from report_page import Page, number_in
from sklearn.metrics import precision_recall_fscore_support

from timm_coretune.report.classes import Confusion, most_confused, show_classes, show_confusion


def random_counts(num_classes):
    numbers = np.random.default_rng(0)
    return (numbers.integers(0, 9, (num_classes, num_classes)) + 20 * np.eye(num_classes, dtype=int)).tolist()


def test_pairs_are_sorted_by_their_counts():
    assert most_confused([[5, 2, 0], [7, 1, 0], [0, 3, 9]]) == [(1, 0, 7), (2, 1, 3), (0, 1, 2)]


@pytest.mark.parametrize('num_classes', [3, 20, 21])
def test_a_matrix_of_few_classes_is_shown_and_pairs_of_any_number(num_classes):
    counts = random_counts(num_classes)
    names = [f'class {i}' for i in range(num_classes)]
    page = Page(show_confusion(Confusion(names, counts, 'Counted.')))
    assert ('matrix' in page.tables) == (num_classes <= 20)
    if 'matrix' in page.tables:
        head, *rows = page.tables['matrix']
        assert head[1:-1] == names
        for name, row, of_class in zip(names, rows, counts, strict=True):
            shown = [f'{100 * count / sum(of_class):.0f}' if count else '' for count in of_class]
            assert row == [name, *shown, str(sum(of_class))]
    _, *pairs = page.tables['pairs']
    flat = sorted((count for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count))[::-1]
    assert [number_in(pair[2]) for pair in pairs] == flat[:15]
    for true, said, count, share in pairs:
        i, j = names.index(true), names.index(said)
        assert counts[i][j] == number_in(count)
        assert number_in(share) == pytest.approx(100 * counts[i][j] / sum(counts[i]), abs=0.051)
    if flat[15:]:
        assert f'Left out: {len(flat) - 15} further pairs with' in page.sections['confusion']
        text = page.sections['confusion'].replace('\u202f', '')
        assert f'with {sum(flat[15:])} images' in text


def test_scores_of_classes_are_those_of_scikit_learn_the_lowest_f1_first():
    counts = random_counts(33)
    counts[4] = [0] * 33  # a class without images
    truth = [i for i, row in enumerate(counts) for count in row for _ in range(count)]
    said = [j for row in counts for j, count in enumerate(row) for _ in range(count)]
    names = [f'class {i}' for i in range(33)]
    page = Page(show_classes(Confusion(names, counts, '').scores(), 'Counted.'))
    head, *rows = page.tables['bars']
    assert head == ['Class', 'F1', 'Recall', 'Precision', 'Images']
    assert len(rows) == 30
    expected = precision_recall_fscore_support(truth, said, labels=range(33), zero_division=0)
    precision, recall, f1, support = expected
    shown = []
    for row in rows:
        i = names.index(row[0])
        shown.append(i)
        values = [f1[i], recall[i], precision[i]]
        if i != 4:
            assert [number_in(cell) for cell in row[1:4]] == pytest.approx([100 * v for v in values], abs=0.051)
        assert number_in(row[4]) == support[i]
    assert shown == np.argsort(f1, kind='stable')[:30].tolist()
    rest = sorted(f1)[30]
    assert f'Left out: 3 further classes, with F1 of {100 * rest:.1f} and above.' in page.sections['classes']


def test_bars_have_the_length_of_their_number():
    records = [{'class': 'a', 'iou': 12.34, 'accuracy': float('nan'), 'pixels': 12345}]
    page = Page(show_classes(records, ''))
    assert page.tables['bars'][1] == ['a', '12.3', '–', '12\u202f345']
    widths = [attributes['style'] for tag, attributes in page.elements if tag == 'i']
    assert widths == ['width:12.3%', 'width:0.0%']


def test_no_confusion_is_said():
    page = Page(show_confusion(Confusion(['a', 'b'], [[3, 0], [0, 0]], 'Counted.')))
    assert 'No class was taken for another one.' in page.sections['confusion']
