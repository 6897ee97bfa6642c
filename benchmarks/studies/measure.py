"""Measures the arms of a study: scores by seed, paired differences to the baseline and their intervals"""

import math
import statistics
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .plan import Cell, Choice, Study, runs_to_test, runs_to_tune
from .results import Results, choice_of, identity
from .train import DIVERGED

CONFIDENCE = 0.95
Row = Mapping[str, str]


class Interval(NamedTuple):
    """Mean of paired differences and half the width of its interval of confidence, NaN for a single pair."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f'{self.mean:+.2f}'
        text = f'{self.mean:+.2f} ± {self.half:.2f}'
        return f'**{text}**' if self.excludes_zero else text


class Measured(NamedTuple):
    """An arm in a table.

    Attributes:
        cell: The arm on the data.
        choice: What the tuning chose, None if it is not over.
        tests: Rows of the test by seed.
        rows: All rows of the arm, those of the tuning too.
    """

    cell: Cell
    choice: Optional[Choice]
    tests: Dict[int, Row]
    rows: List[Row]

    def scores(self, name: str) -> Dict[int, float]:
        """A score by seed. Runs that diverged have none."""
        return {seed: float(row[name]) for seed, row in self.tests.items() if row['outcome'] != DIVERGED}


def interval_of(differences: Sequence[float]) -> Interval:
    """Mean and half the width of its interval by Student's t distribution with n - 1 degrees of freedom."""
    from scipy.stats import t

    mean, n = statistics.mean(differences), len(differences)
    if n < 2:
        return Interval(mean, math.nan)
    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(differences) / n**0.5)


def measure(cell: Cell, kind: str, rows: Mapping[Tuple[str, ...], Row]) -> Measured:
    """Collect what the results have of a cell."""
    choice = choice_of(cell, kind, rows)
    tests: Dict[int, Row] = {}
    lrs = cell.lrs if choice is None else choice.lrs
    used = [rows[key] for key in (identity(run.key) for run in runs_to_tune(cell, lrs)) if key in rows]
    if choice is not None:
        keys = {seed: identity(run.key) for seed, run in runs_to_test(cell, choice).items()}
        tests = {seed: rows[key] for seed, key in keys.items() if key in rows}
    return Measured(cell, choice, tests, [*used, *tests.values()])


def difference(arm: Measured, baseline: Measured, score: str) -> Optional[Interval]:
    """The arm minus the baseline over the seeds that both have, None if there is none."""
    ours, theirs = arm.scores(score), baseline.scores(score)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return interval_of(pairs) if pairs else None


def tables_of(study: Study, cells: Sequence[Cell], results: Results) -> Iterator[List[Measured]]:
    """The arms of each table, which is of one data set, network and share of labels. The baseline is the first."""
    rows = results.by_key()
    groups: Dict[Tuple[str, ...], List[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.network, cell.labels), []).append(cell)
    for group in groups.values():
        arms = [measure(cell, study.kind, rows) for cell in group]
        baseline = [arm for arm in arms if arm.cell.arm == study.baseline]
        if not baseline:
            raise ValueError(f'Expected the arm {study.baseline} in the tables. Leave it in --only.')
        if any(arm.rows for arm in arms):
            yield [*baseline, *(arm for arm in arms if arm is not baseline[0])]
