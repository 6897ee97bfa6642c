"""Classes of a run: what is taken for what, and the scores of each"""

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch

from ..evaluation.classification import ClassificationEvaluator
from .html import name, number, paragraph, section, table

_MOST_IN_MATRIX = 20  # classes
_MOST_PAIRS = 15
_MOST_BARS = 30
# columns of per_class.csv by their titles; the first that is there ranks the classes
_SCORES = {'iou': 'IoU', 'f1': 'F1', 'recall': 'Recall', 'precision': 'Precision', 'accuracy': 'Accuracy', 'ap': 'AP'}
_COUNTS = {'support': 'Images', 'pixels': 'Pixels'}


class Confusion(NamedTuple):
    """How often each class was predicted as each other.

    Attributes:
        names: Names of the classes.
        counts: A row for each true class.
        source: Sentence that tells what was counted.
    """

    names: List[str]
    counts: List[List[int]]
    source: str

    def scores(self) -> List[Dict[str, Any]]:
        """Precision, recall and F1 of each class in percent, and its number of images."""
        evaluator = ClassificationEvaluator(None, ['per-class'], len(self.names), self.names)
        evaluator.matrix = torch.tensor(self.counts)
        return evaluator.per_class()


def most_confused(counts: Sequence[Sequence[int]]) -> List[Tuple[int, int, int]]:
    """Pairs of a true class and another that was predicted, with their counts, the most frequent first."""
    pairs = [(i, j, count) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j]
    return sorted(pairs, key=lambda pair: -pair[2])


def show_confusion(confusion: Confusion, unit: str = 'images') -> str:
    """The section of the confusion matrix: the matrix if there are few classes, and the most confused pairs."""
    names, counts = confusion.names, confusion.counts
    if len(names) > _MOST_IN_MATRIX:
        shown = _pairs(names, counts, unit)
    else:
        halves = (_matrix(names, counts, unit), _pairs(names, counts, unit))
        shown = f'<div class="split">{"".join(f"<div>{half}</div>" for half in halves)}</div>'
    return section('confusion', 'Confusion', paragraph(confusion.source), shown)


def _pairs(names: Sequence[str], counts: Sequence[Sequence[int]], unit: str) -> str:
    pairs = most_confused(counts)
    if not pairs:
        return paragraph('No class was taken for another one.')
    rows = [
        [name(names[i]), name(names[j]), number(count, 0), _bar(100 * count / sum(counts[i]))]
        for i, j, count in pairs[:_MOST_PAIRS]
    ]
    shown = table(['True class', 'Taken for', unit.capitalize(), '% of the true class'], rows, kind='pairs')
    left_out = pairs[_MOST_PAIRS:]
    if left_out:
        total = sum(count for *_, count in left_out)
        shown += paragraph(f'Left out: {number(len(left_out), 0)} further pairs with {number(total, 0)} {unit}.')
    return shown


def _matrix(names: Sequence[str], counts: Sequence[Sequence[int]], unit: str) -> str:
    rows = []
    for title, row in zip(names, counts, strict=True):
        total = sum(row)
        cells = [f'<th scope="row">{name(title)}</th>']
        for count in row:
            share = count / total if total else 0
            shown = f'{100 * share:.0f}' if count else ''
            kind = ' class="deep"' if share > 0.55 else ''
            label = f'title="{number(count, 0)} {unit}"'
            cells.append(f'<td{kind} style="--share:{share:.3f}" {label}>{shown}</td>')
        rows.append(f'<tr>{"".join(cells)}<td class="total">{number(total, 0)}</td></tr>')
    head = ''.join(f'<th scope="col"><div>{name(title)}</div></th>' for title in names)
    corner = '<th scope="col" class="corner">true ↓ &nbsp; said →</th>'
    total_head = f'<th scope="col"><div>{unit}</div></th>'
    lines = '\n'.join(rows)
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr>{corner}{head}{total_head}</tr></thead>\n'
        f'<tbody>\n{lines}\n</tbody></table></div>' + paragraph('Each row is in % of its true class.')
    )


def _bar(value: float) -> str:
    """A number between 0 and 100 with a bar of that length."""
    width = 0.0 if value != value else min(max(value, 0.0), 100.0)
    return f'<span class="bar"><b>{number(value)}</b><i style="width:{width:.1f}%"></i></span>'


def show_classes(records: Sequence[Dict[str, Any]], source: str) -> str:
    """The section of the scores of each class, the worst first."""
    columns = [column for column in _SCORES if column in records[0]]
    counts = [column for column in _COUNTS if column in records[0]]
    ranked = sorted(records, key=lambda record: (record[columns[0]] != record[columns[0]], record[columns[0]]))
    rows = [
        [name(record['class']), *(_bar(record[k]) for k in columns), *(number(record[k], 0) for k in counts)]
        for record in ranked[:_MOST_BARS]
    ]
    header = ['Class', *(_SCORES[column] for column in columns), *(_COUNTS[column] for column in counts)]
    parts = [paragraph(source, f'In %, the lowest {_SCORES[columns[0]]} first. A dash: the score is not defined.')]
    parts.append(table(header, rows, kind='bars'))
    left_out = ranked[_MOST_BARS:]
    if left_out:
        least = number(left_out[0][columns[0]])
        parts.append(
            paragraph(f'Left out: {len(left_out)} further classes, with {_SCORES[columns[0]]} of {least} and above.')
        )
    return section('classes', 'Classes', *parts)
