"""Features of held-out images before and after the run: a map of each, and numbers"""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .html import legend, name, number, paragraph, section, table, text
from .svg import MUTED, NUM_COLORS, chart, color, create_chart, to_svg

# figures of measure_features: title, digits, and what the figure tells
_FIGURES = {
    'knn_top1': ('kNN accuracy, %', 1, 'share of the images whose nearest training images vote for the right class'),
    'within_class': ('Scatter within classes', 3, 'mean squared distance to the mean of the class: lower is tighter'),
    'between_class': ('Distance between classes', 3, 'mean squared distance between the means of two classes'),
    'ratio': ('Scatter over distance', 3, 'the first of these divided by the second: lower is better separated'),
    'rank_me': ('RankMe', 1, 'effective number of directions that the features use'),
}


class FeatureSet(NamedTuple):
    """Features of the held-out images by one model.

    Attributes:
        title: Which model, in a word.
        detail: More about it.
        features: The features (N, D).
        figures: What `measure_features` has measured. Empty without training images to compare with.
    """

    title: str
    detail: str
    features: torch.Tensor
    figures: Dict[str, float]


def project(features: torch.Tensor) -> Tuple[torch.Tensor, List[float]]:
    """The two principal components (N, 2) of features of length 1 (N, D), and the share of the variance of each.

    The sign of a component is such that its largest entry by magnitude is positive, so that the same features give the
    same map.
    """
    centred = F.normalize(features.double(), dim=1)
    centred = centred - centred.mean(dim=0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()
    variance = values.square()
    shares = (variance[:2] / variance.sum().clamp(min=1e-30)).tolist()
    places = centred @ directions.T
    missing = 2 - places.shape[1]
    return F.pad(places, (0, missing)), [*shares, *[0.0] * missing]


def show_features(
    sets: Sequence[FeatureSet], labels: torch.Tensor, class_names: Sequence[str], source: str, note: str = ''
) -> str:
    """The section of features.

    Args:
        sets: Features of the same images, those before the run first.
        labels: Classes of the images (N,).
        class_names: Names of the classes.
        source: Sentence that tells which images these are.
        note: Why there is no other set, as HTML.
    """
    coloured, entries, left_out = _choose_colours(labels, class_names)
    charts = [_draw(features, labels, coloured, f'map{i}') for i, features in enumerate(sets)]
    how = (
        'A point is an image, a colour is a class. The axes are the two principal components of the features (those '
        'before the classifier, each divided by its length). Each map has its own.'
    )
    maps = f'<div class="mapped"><div class="charts maps">{"".join(charts)}</div>{legend(entries)}</div>'
    parts = (paragraph(source, how, left_out), note, maps, _figures(sets))
    return section('features', 'Features before and after', *parts)


def _choose_colours(labels: torch.Tensor, class_names: Sequence[str]) -> Tuple[List[int], List[Tuple[int, str]], str]:
    """The classes that have a colour, entries of a legend, and a sentence about the others."""
    counts = torch.bincount(labels, minlength=len(class_names))
    there = [c for c in counts.argsort(descending=True, stable=True).tolist() if counts[c]]
    coloured = sorted(there[:NUM_COLORS])
    entries = [(number, name(class_names[c])) for number, c in enumerate(coloured)]
    others = len(there) - len(coloured)
    return coloured, entries, f'The {others} classes with the fewest images are grey.' if others else ''


def _draw(features: FeatureSet, labels: torch.Tensor, coloured: List[int], key: str) -> str:
    places, shares = project(features.features)
    figure, axes = create_chart(4.6, 4.2)
    size = 5 if len(labels) < 400 else 3.6
    numbers: Dict[Optional[int], Any] = {c: color(number) for number, c in enumerate(coloured)}
    rest = torch.tensor([label not in numbers for label in labels.tolist()])
    for shown, fill in ((rest, MUTED), *((labels == c, numbers[c]) for c in coloured)):
        if shown.any():
            x, y = places[shown].T.tolist()
            axes.plot(x, y, 'o', color=fill, markersize=size, markeredgewidth=0, alpha=0.75)
    axes.set_aspect('equal', adjustable='datalim')
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.set_xlabel(f'component 1, {100 * shares[0]:.0f} % of the variance', fontsize=9)
    axes.set_ylabel(f'component 2, {100 * shares[1]:.0f} %', fontsize=9)
    title = f'{text(features.title)} <small>{text(features.detail)}</small>'
    return chart(to_svg(figure, f'Map of the features {features.title}', key), title)


def _with_ratio(figures: Dict[str, float]) -> Dict[str, float]:
    between = figures['between_class']
    return {**figures, 'ratio': figures['within_class'] / between if between else math.nan}


def _figures(sets: Sequence[FeatureSet]) -> str:
    measured = [features._replace(figures=_with_ratio(features.figures)) for features in sets if features.figures]
    if not measured:
        return ''
    rows = []
    for key, (title, digits, meaning) in _FIGURES.items():
        values = [features.figures[key] for features in measured]
        cells = [number(value, digits) for value in values]
        if len(values) == 2:
            change = values[1] - values[0]
            cells.append(f'{"+" if change > 0 else ""}{number(change, digits)}')
        rows.append([f'{title}<small>{meaning}</small>', *cells])
    header = ['', *(features.title for features in measured), *(['Change'] if len(measured) == 2 else [])]
    return table(header, rows, kind='figures')
