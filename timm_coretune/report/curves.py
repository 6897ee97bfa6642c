"""Curves of a run: each kind of loss, the scores of the validation, the learning rate, and what else was recorded"""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ..evaluation.scores import PERCENT, SCORES
from ..run_folder import EVAL_PREFIX, FEATURES_PREFIX, START_EPOCH
from .html import legend, paragraph, section, text
from .svg import NUM_COLORS, SOFT, chart, color, create_chart, to_svg

_TRAIN_PREFIX = 'train_'
_OF_TRAINING = {
    'loss': 'Training loss, all parts',
    'task': 'Task loss',
    'contrast': 'Contrastive loss',
    'dense': 'Cross-entropy of all pixels',
}
_OF_FEATURES = {
    'knn_top1': 'kNN accuracy of the features, %',
    'within_class': 'Scatter within classes',
    'between_class': 'Distance between classes',
    'rank_me': 'RankMe of the features',
}
_LIKE_VALIDATION = ('dense', 'task', 'loss')  # the first that is there is compared with the loss of the validation


class Panel(NamedTuple):
    """A chart of curves.

    Attributes:
        title: Its title.
        unit: Unit of its values, '' if they have none or it is not known.
        columns: Columns of the summary that it shows, by their names in the legend.
    """

    title: str
    unit: str
    columns: Dict[str, str]


def arrange(columns: Sequence[str]) -> List[Panel]:
    """Share the columns of a summary out to charts. Each column but the epoch is in one of them."""
    left = [column for column in columns if column != 'epoch']
    scores = {column: SCORES.get(column.removeprefix(EVAL_PREFIX)) for column in left if column.startswith(EVAL_PREFIX)}
    percents = {score.title: column for column, score in scores.items() if score and score.unit == PERCENT}
    panels = []
    for part, title in _OF_TRAINING.items():
        column = f'{_TRAIN_PREFIX}{part}'
        if column in left:
            panels.append(Panel(title, 'nats', {'training': column}))
    of_column = {panel.columns['training']: panel for panel in panels}
    alike = next(
        (of_column[column] for column in map(_TRAIN_PREFIX.__add__, _LIKE_VALIDATION) if column in of_column), None
    )
    if f'{EVAL_PREFIX}loss' in left and alike is not None:
        alike.columns['validation'] = f'{EVAL_PREFIX}loss'
    if percents:
        panels.append(Panel('Scores of the validation', '%', percents))
    shown = {column for panel in panels for column in panel.columns.values()}
    # whatever a method or an option adds has a chart of its own; the learning rate comes last
    for column in sorted((column for column in left if column not in shown), key='lr'.__eq__):
        title = 'Learning rate' if column == 'lr' else _title_of(column)
        panels.append(Panel(title, '', {title: column}))
    return panels


def _title_of(column: str) -> str:
    if column.removeprefix(FEATURES_PREFIX) in _OF_FEATURES:
        return _OF_FEATURES[column.removeprefix(FEATURES_PREFIX)]
    words = column.replace('_', ' ')
    for prefix, of in ((_TRAIN_PREFIX, 'training'), (EVAL_PREFIX, 'validation')):
        if column.startswith(prefix):
            words = f'{column.removeprefix(prefix).replace("_", " ")} ({of})'
    return words[:1].upper() + words[1:]


def draw_curves(columns: Dict[str, List[float]], best_epoch: Optional[int]) -> str:
    """The section of curves, from the columns of a summary by name."""
    epochs = [epoch for epoch in columns.get('epoch', ()) if epoch != START_EPOCH]
    if not epochs:
        return section('curves', 'Curves', paragraph('No epoch has ended, so there are no curves.'))
    charts = [_draw(panel, columns, best_epoch, f'curve{i}') for i, panel in enumerate(arrange(list(columns)))]
    before = f'Epoch {START_EPOCH} is before the run.' if len(epochs) < len(columns['epoch']) else ''
    marked = '' if best_epoch is None else f'The dotted line marks epoch {best_epoch}, whose weights were kept.'
    lines = [paragraph(f'Epochs {int(epochs[0])} to {int(epochs[-1])} of <code>summary.csv</code>.', before, marked)]
    return section('curves', 'Curves', *lines, f'<div class="charts">{"".join(charts)}</div>')


def _draw(panel: Panel, columns: Dict[str, List[float]], best_epoch: Optional[int], key: str) -> str:
    from matplotlib.ticker import MaxNLocator

    figure, axes = create_chart()
    entries = []
    # the training is the first colour in every chart, the validation the second
    first = 1 if panel.unit == '%' else 0
    for index, (label, column) in enumerate(panel.columns.items()):
        number = (first + index) % NUM_COLORS
        _plot(axes, columns['epoch'], columns[column], color(number))
        entries.append((number, text(label)))
    if best_epoch is not None:
        axes.axvline(best_epoch, color=SOFT, linewidth=1.2, linestyle=(0, (2, 2)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel('epoch', fontsize=9)
    axes.margins(x=0.03)
    svg = to_svg(figure, f'{panel.title} by epoch', key)
    unit = f' <small>{panel.unit}</small>' if panel.unit else ''
    return chart(svg, f'{text(panel.title)}{unit}', legend(entries) if len(entries) > 1 else '')


def _plot(axes: Any, epochs: List[float], values: List[float], stroke: str) -> None:
    """A line through the epochs that have a value."""
    points = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
    marker = 'o' if len(points) < 30 else ''
    axes.plot(*zip(*points, strict=True) if points else ([], []), color=stroke, linewidth=1.8, marker=marker, ms=3)
