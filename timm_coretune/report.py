"""Curves of a run as a picture"""

import csv
import os
from typing import Dict, List


def read_summary(path: str) -> Dict[str, List[float]]:
    """Columns of a summary.csv."""
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}


def plot_curves(summary_path: str, picture_path: str) -> None:
    """Draw losses, accuracy and learning rate over epochs.

    Args:
        summary_path: The summary.csv of a run.
        picture_path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The summary has no rows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("Pictures need matplotlib: pip install 'timm-coretune[vis]'") from e

    columns = read_summary(summary_path)
    if not columns:
        raise ValueError(f'Expected at least one epoch in {summary_path!r}, found none.')
    figure = Figure(figsize=(11, 3.4), layout='constrained')
    FigureCanvasAgg(figure)  # no global state and no display
    loss_axes, accuracy_axes, lr_axes = figure.subplots(1, 3)
    for name, values in columns.items():
        label = name.replace('train_', 'train ').replace('eval_', 'validation ').replace('_', ' ')
        if name == 'lr':
            lr_axes.plot(columns['epoch'], values, marker='.')
        elif name.startswith('eval_top'):
            accuracy_axes.plot(columns['epoch'], values, marker='.', label=label)
        elif name != 'epoch':
            loss_axes.plot(columns['epoch'], values, marker='.', label=label)
    for axes, title in ((loss_axes, 'loss (nats)'), (accuracy_axes, 'accuracy (%)'), (lr_axes, 'learning rate')):
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    temporary = f'{picture_path}.tmp'
    figure.savefig(temporary, format='png', dpi=120)
    os.replace(temporary, picture_path)
