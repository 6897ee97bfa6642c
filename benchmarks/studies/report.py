"""Tables of a study, from its results"""

import os
import statistics
import sys
from typing import Dict, List, Optional, Sequence

from .measure import CONFIDENCE, Measured, Row, difference, tables_of
from .plan import MOST_EXTENSIONS, SCORES, Cell, Study
from .results import Results
from .train import DIVERGED


def _chosen(value: Optional[float], tried: Sequence[Optional[float]], mark: str = '') -> str:
    if value is None:
        return ''
    return f'{value:g}{mark} ({", ".join(f"{other:g}" for other in tried if other is not None)})'


def _line(arm: Measured, baseline: Measured, title: str, scores: Sequence[str]) -> str:
    cell, choice = arm.cell, arm.choice
    if choice is None or not arm.tests:
        return f'| {title} | {"not tuned yet" if choice is None else "not tested yet"} |'
    lr = _chosen(choice.lr, choice.lrs, '' if choice.is_inside else '*')
    columns = [title, lr, _chosen(choice.weight, cell.weights)]
    for number, score in enumerate(scores):
        values = arm.scores(score)
        if number == 0:
            columns.append(', '.join(f'{values[s]:.1f}' if s in values else DIVERGED for s in arm.tests))
        columns.append(f'{statistics.mean(values.values()):.2f}' if values else '')
        paired = None if arm is baseline else difference(arm, baseline, score)
        columns.append('' if paired is None else str(paired))
    return f'| {" | ".join(columns)} |'


def heading(study: Study, cell: Cell) -> str:
    labels = '' if cell.labels == 'all' else f', labels: {cell.labels}'
    return f'{study.titles[cell.data]}; {study.titles[cell.network]}{labels}'


def render(study: Study, cells: Sequence[Cell], results: Results) -> str:
    """The tables as Markdown."""
    scores, parts = SCORES[study.kind], []
    num_intervals, used = 0, []
    tables = list(tables_of(study, cells, results))
    for arms in tables:
        baseline, first = arms[0], arms[0].cell
        against = study.titles[study.baseline]
        head = ['arm', 'learning rate (tried)', 'weight (tried)']
        for number, title in enumerate(scores.values()):
            seeds = f'seeds {", ".join(map(str, first.test.seeds))}'
            head += [*([f'{title}, {seeds}'] if number == 0 else []), f'{title}, mean', f'minus {against}']
        lines = [_line(arm, baseline, study.titles[arm.cell.arm], list(scores)) for arm in arms]
        table = [f'| {" | ".join(head)} |', '|---' * len(head) + '|', *lines]
        parts.append('\n'.join([f'### {heading(study, first)}', '', *table]))
        num_intervals += sum(difference(arm, baseline, s) is not None for arm in arms[1:] for s in scores)
        used += [row for arm in arms for row in arm.rows]
    if not parts:
        others = len(results.rows())
        more = f' {others} line(s) of the results are of other flags or settings.' if others else ''
        return f'No run of this study is done yet.{more}'
    if len(tables) > 1:
        parts.append(_mean_over(study, tables))
    parts.append(_notes(results, used, num_intervals))
    return '\n\n'.join(parts)


def _mean_over(study: Study, tables: Sequence[Sequence[Measured]]) -> str:
    """A table of the mean difference of each arm over all tables, which weigh alike."""
    scores = SCORES[study.kind]
    found: Dict[str, List[List[float]]] = {}
    for baseline, *arms in tables:
        for arm in arms:
            paired = [difference(arm, baseline, score) for score in scores]
            if all(p is not None for p in paired):
                found.setdefault(arm.cell.arm, []).append([p.mean for p in paired if p is not None])
    lines = []
    for arm, rows in found.items():
        if len(rows) == len(tables):
            means = [f'{statistics.mean(column):+.2f}' for column in zip(*rows, strict=True)]
            lines.append(f'| {study.titles[arm]} | {" | ".join(means)} |')
    head = ['arm', *(f'{title}, minus {study.titles[study.baseline]}' for title in scores.values())]
    return '\n'.join(
        [f'### Mean over the {len(tables)} tables', '', f'| {" | ".join(head)} |', '|---' * len(head) + '|', *lines]
    )


def _notes(results: Results, used: Sequence[Row], num_intervals: int) -> str:
    def values(name: str) -> str:
        return ', '.join(sorted({row[name] for row in used}))

    hours = sum(float(row['cpu_seconds']) for row in used) / 3600
    notes = [
        'Differences are means over the seeds that both arms have, ± half the 95 % interval by the t distribution; '
        f'bold if it excludes 0. Of {num_intervals} such intervals {num_intervals * (1 - CONFIDENCE):.1f} would '
        'exclude 0 by chance.',
        f'A rate with * is the lowest or highest that was tried, after {MOST_EXTENSIONS} further ones.',
        f'{len(used)} runs, {hours:.1f} hours of the processor with {values("threads")} thread(s) a run on '
        f'{values("machine")}; torch {values("torch")}, timm {values("timm")}, timm_coretune {values("commit")}.',
    ]
    num_others = len(results.rows()) - len(used)
    if num_others:
        notes.append(f'{num_others} line(s) of the results are of other flags or settings and are not shown.')
    return '\n'.join(notes)


def begin_of(study_path: str) -> str:
    return f'<!-- tables of {os.path.basename(study_path)}, written by benchmarks/study.py -->'


END = '<!-- end of the tables -->'


def write_tables(text: str, study_path: str, path: str) -> None:
    """Write the tables between their markers in a page, or print them if the path is '-'.

    Raises:
        ValueError: The page has no markers for this study.
    """
    if path == '-':
        sys.stdout.write(f'{text}\n')
        return
    begin = begin_of(study_path)
    with open(path, encoding='utf-8') as f:
        before, found, rest = f.read().partition(begin)
    if not found or END not in rest:
        raise ValueError(f'Expected the lines {begin} and {END} in {path!r}. Add them where the tables belong.')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(f'{before}{begin}\n\n{text}\n\n{END}{rest.partition(END)[2]}')
