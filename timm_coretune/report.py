"""Pictures of a run"""

import csv
import os
from typing import Any, Dict, List

_PERCENTAGES = ('eval_top1', 'eval_top5', 'eval_macro_f1', 'eval_ece')


def read_summary(path: str) -> Dict[str, List[float]]:
    """Columns of a summary.csv."""
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}


def _create_figure(**kwargs) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("Pictures need matplotlib: pip install 'timm-coretune[vis]'") from e
    figure = Figure(layout='constrained', **kwargs)
    FigureCanvasAgg(figure)  # no global state and no display
    return figure


def _save_figure(figure: Any, path: str) -> None:
    temporary = f'{path}.tmp'
    figure.savefig(temporary, format='png', dpi=120)
    os.replace(temporary, path)


def plot_curves(summary_path: str, picture_path: str) -> None:
    """Draw losses, accuracy and learning rate over epochs.

    Args:
        summary_path: The summary.csv of a run.
        picture_path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The summary has no rows.
    """
    figure = _create_figure(figsize=(11, 3.4))
    columns = read_summary(summary_path)
    if not columns:
        raise ValueError(f'Expected at least one epoch in {summary_path!r}, found none.')
    loss_axes, accuracy_axes, lr_axes = figure.subplots(1, 3)
    for name, values in columns.items():
        label = name.replace('train_', 'train ').replace('eval_', 'validation ').replace('_', ' ')
        if name == 'lr':
            lr_axes.plot(columns['epoch'], values, marker='.')
        elif name in _PERCENTAGES:
            accuracy_axes.plot(columns['epoch'], values, marker='.', label=label)
        elif name != 'epoch':
            loss_axes.plot(columns['epoch'], values, marker='.', label=label)
    for axes, title in ((loss_axes, 'loss (nats)'), (accuracy_axes, 'accuracy (%)'), (lr_axes, 'learning rate')):
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    _save_figure(figure, picture_path)


def plot_confusion(matrix_path: str, picture_path: str) -> None:
    """Draw a confusion matrix, each row as shares of its true class.

    Args:
        matrix_path: The confusion.csv of a run.
        picture_path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with open(matrix_path, newline='') as f:
        (_, *names), *rows = csv.reader(f)
    counts = [[float(value) for value in values] for _, *values in rows]
    shares = [[100 * value / max(sum(row), 1.0) for value in row] for row in counts]
    side = min(4 + 0.28 * len(names), 24)
    figure = _create_figure(figsize=(side, side))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8, label='% of the true class')
    axes.set_xlabel('predicted')
    axes.set_ylabel('true')
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for i, row in enumerate(shares):
            for j, value in enumerate(row):
                color = 'white' if value > 50 else 'black'
                axes.text(j, i, f'{value:.0f}', ha='center', va='center', fontsize=8, color=color)
    _save_figure(figure, picture_path)
