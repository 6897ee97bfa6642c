"""Pictures of a run: learning curves, confusion matrix, predicted masks"""

from typing import Any, Dict, List, Optional, Sequence

import torch

from ..atomic import write_whole
from ..evaluation.scores import PERCENT, SCORES
from ..evaluation.tables import read_confusion
from ..run_folder import EVAL_PREFIX, FEATURES_PREFIX, read_summary
from .labels import create_labels

_STRIPE = 128  # ignored pixels get stripes of this gray level, as white may be the colour of a class


def read_columns(path: str) -> Dict[str, List[float]]:
    """Read the columns of a summary.csv by name. Without rows there are no columns."""
    rows = read_summary(path)
    # a score that was asked for in the middle of a run has no value before
    return {name: [float(row[name] or 'nan') for row in rows] for name in rows[0]} if rows else {}


def _is_percentage(score: str) -> bool:
    return score in SCORES and SCORES[score].unit == PERCENT


def create_figure(**kwargs: Any) -> Any:
    """A figure of matplotlib that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("Pictures need matplotlib: pip install 'timm-coretune[vis]'") from e
    figure = Figure(layout='constrained', **kwargs)
    FigureCanvasAgg(figure)  # unlike pyplot it needs no display and keeps no global state
    return figure


def _save_figure(figure: Any, path: str) -> None:
    with write_whole(path) as temporary:
        figure.savefig(temporary, format='png', dpi=120)


def plot_curves(summary_path: str, picture_path: str) -> None:
    """Draw losses, accuracy and learning rate over the epochs of a run.

    Args:
        summary_path: The summary.csv of the run.
        picture_path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The summary has no rows.
    """
    figure = create_figure(figsize=(11, 3.4))
    columns = read_columns(summary_path)
    if not columns:
        raise ValueError(f'Expected at least one epoch in {summary_path!r}, found none.')
    loss_axes, accuracy_axes, lr_axes = figure.subplots(1, 3)
    for name, values in columns.items():
        label = name.replace('train_', 'train ').replace('eval_', 'validation ').replace('_', ' ')
        if name == 'lr':
            lr_axes.plot(columns['epoch'], values, marker='.')
        elif name.startswith(EVAL_PREFIX) and _is_percentage(name.removeprefix(EVAL_PREFIX)):
            accuracy_axes.plot(columns['epoch'], values, marker='.', label=label)
        elif name != 'epoch' and not name.startswith(FEATURES_PREFIX):
            loss_axes.plot(columns['epoch'], values, marker='.', label=label)
    for axes, title in ((loss_axes, 'loss (nats)'), (accuracy_axes, 'accuracy (%)'), (lr_axes, 'learning rate')):
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    _save_figure(figure, picture_path)


def plot_confusion(matrix_path: str, picture_path: str) -> None:
    """Draw a confusion matrix. Every row is in percent of the images or pixels of its true class.

    Args:
        matrix_path: The confusion.csv of a run.
        picture_path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names, counts = read_confusion(matrix_path)
    shares = [[100 * value / max(sum(row), 1.0) for value in row] for row in counts]
    figure = create_figure()
    labels, families = create_labels(names) if len(names) <= 60 else ([], [])
    room = 0.08 * max([len(label) - 10 for label in labels] + [0])  # for long labels, beside the matrix and below it
    side = min(4 + 0.28 * len(names), 24) + room
    figure.set_size_inches(side, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8, label='% of the true class')
    axes.set_xlabel('predicted')
    axes.set_ylabel('true')
    if labels:
        with _without_formulas():
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontfamily=families)
            axes.set_yticks(range(len(labels)), labels, fontfamily=families)
    if len(names) <= 20:
        for i, row in enumerate(shares):
            for j, value in enumerate(row):
                color = 'white' if value > 50 else 'black'
                axes.text(j, i, f'{value:.0f}', ha='center', va='center', fontsize=8, color=color)
    _save_figure(figure, picture_path)


def plot_segmentation(
    images: Sequence[torch.Tensor],
    truths: Sequence[torch.Tensor],
    predictions: Sequence[torch.Tensor],
    palette: Sequence[int],
    class_names: Optional[Sequence[str]],
    picture_path: str,
    ignore_index: int = 255,
) -> None:
    """Draw images beside their true and predicted masks, with a legend of the classes that occur.

    Args:
        images: Float in [0, 1] or uint8, each (3, height, width).
        truths: True class indices, each (height, width). Pixels to ignore become gray stripes on white.
        predictions: Predicted class indices, each (height, width).
        palette: Red, green and blue of 256 classes in turn, 768 numbers, as in PIL.
        class_names: Names of the classes by index. When None their indices.
        picture_path: PNG file to write.
        ignore_index: Value of the pixels to ignore.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no image, or the palette has not 768 numbers.
    """
    if len(images) == 0 or len(palette) != 768:
        raise ValueError(
            f'Expected at least one image and a palette of 256 x 3 numbers, got {len(images)} image(s) and '
            f'{len(palette)} numbers. Fill the palette up with zeros.'
        )
    colors = torch.tensor(palette, dtype=torch.uint8).reshape(256, 3)
    masks = [mask for pair in zip(truths, predictions, strict=True) for mask in pair]
    classes = sorted(set().union(*(mask.unique().tolist() for mask in masks)))
    figure = create_figure()
    known, families = create_labels(class_names or [])
    names = ['ignored' if c == ignore_index else known[c] if c < len(known) else str(c) for c in classes]
    columns = max(1, min(6, 120 // (8 + max(map(len, names)))))
    figure.set_size_inches(9, 3 * len(images) + 0.4 + 0.25 * (len(classes) // columns))
    grid = figure.subplots(len(images), 3, squeeze=False)
    for axes, image, *pair in zip(grid, images, truths, predictions, strict=True):
        panels = [_to_pixels(image), *(_paint(mask, colors, ignore_index) for mask in pair)]
        for ax, panel in zip(axes, panels, strict=True):
            ax.imshow(panel, interpolation='nearest')  # interpolation would mix colours of the palette
            ax.set_axis_off()
    for ax, title in zip(grid[0], ('image', 'truth', 'prediction'), strict=True):
        ax.set_title(title)
    entries = []
    for c, name in zip(classes, names, strict=True):
        style: Dict[str, Any] = dict(facecolor=[v / 255 for v in colors[c].tolist()])
        if c == ignore_index:
            style = dict(facecolor='white', edgecolor='gray', hatch='////')
        entries.append(_create_patch(label=name, **style))
    with _without_formulas():
        figure.legend(
            handles=entries, loc='outside lower center', ncols=columns, frameon=False, prop=dict(family=families)
        )
    _save_figure(figure, picture_path)


def _without_formulas() -> Any:
    """Texts that are created meanwhile are drawn as they are: a name may have dollar signs."""
    from matplotlib import rc_context

    return rc_context({'text.parse_math': False})


def _create_patch(**style: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(**style)


def _to_pixels(image: torch.Tensor) -> Any:
    if image.is_floating_point():
        image = (255 * image.clamp(0, 1)).round().byte()
    return image.permute(1, 2, 0).cpu().numpy()


def _paint(mask: torch.Tensor, colors: torch.Tensor, ignore_index: int) -> Any:
    mask = mask.cpu().long()
    ignored = mask == ignore_index
    painted = colors[mask.masked_fill(ignored, 0)]
    rows, columns = (torch.arange(size) for size in mask.shape)
    period = max(4, mask.shape[1] // 16)  # stripes look alike in images of every size
    stripes = (rows[:, None] + columns) % period < period // 4
    painted[ignored] = 255
    painted[ignored & stripes] = _STRIPE
    return painted.numpy()
