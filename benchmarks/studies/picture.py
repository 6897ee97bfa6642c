"""Draws the differences of a study to its baseline"""

import textwrap
from typing import Sequence

from .measure import difference, tables_of
from .plan import SCORES, Cell, Study
from .report import heading
from .results import Results


def draw(study: Study, cells: Sequence[Cell], results: Results, path: str) -> None:
    """Draw paired differences of the first score with their intervals, a panel for each table, as PNG or SVG.

    Raises:
        ValueError: No arm has a seed in common with the baseline.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    score, title = next(iter(SCORES[study.kind].items()))
    panels = []
    for baseline, *arms in tables_of(study, cells, results):
        paired = [(study.titles[arm.cell.arm], difference(arm, baseline, score)) for arm in arms]
        found = [(name, interval) for name, interval in paired if interval is not None]
        if found:
            panels.append((heading(study, baseline.cell), found))
    if not panels:
        raise ValueError(f'Expected a tested arm beside {study.baseline} in {results.path!r}, there is none yet.')
    heights = [len(found) + 2 for _, found in panels]
    figure = Figure(figsize=(9, 0.32 * sum(heights) + 0.6), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (name, found) in zip(axes, panels, strict=True):
        means, halves = [i.mean for _, i in found], [i.half for _, i in found]
        axis.axvline(0, color='0.6', linewidth=1)
        axis.errorbar(means, range(len(found)), xerr=halves, fmt='o', capsize=3, markersize=4, color='tab:blue')
        axis.set_yticks(range(len(found)), [textwrap.fill(arm, 45) for arm, _ in found], fontsize=7)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.set_title(textwrap.fill(name, 75), loc='left', fontsize=8)
    axes[-1].set_xlabel(f'{title} minus {study.titles[study.baseline]}, paired, 95 % interval')
    figure.savefig(path, dpi=150)
