"""The results of a study: a CSV file with a line for each run"""

import csv
import io
import os
from typing import Dict, List, Mapping, Optional, Tuple

from filelock import FileLock

from .plan import SCORES, Cell, Choice, Run, runs_to_test, runs_to_tune, tune
from .train import DIVERGED

KEY = ('data', 'network', 'labels', 'arm', 'lr', 'weight', 'seed', 'stage', 'flags')
SCORE_COLUMNS = ('top1', 'class_mean', 'miou', 'mpa', 'fwiou', 'pa')
COLUMNS = (
    *KEY,
    'outcome',
    'epochs',
    *SCORE_COLUMNS,
    'seconds',
    'cpu_seconds',
    'threads',
    'machine',
    'commit',
    'torch',
    'timm',
)


class Results:
    """Reads and appends to the file. Several processes may append to it.

    Args:
        path: The CSV file, created with the first line.

    Raises:
        ValueError: The file has other columns.
    """

    def __init__(self, path: str):
        self.path = path
        self.lock = FileLock(f'{path}.lock')
        header = self._text().partition('\n')[0].rstrip('\r')
        if header and tuple(header.split(',')) != COLUMNS:
            raise ValueError(f'Expected the columns {",".join(COLUMNS)} in {path!r}, got {header}. Move the file away.')

    def _text(self) -> str:
        """The whole lines. A process that was killed may have left a part of one at the end."""
        if not os.path.exists(self.path):
            return ''
        with open(self.path, newline='', encoding='utf-8') as f:
            text = f.read()
        return text[: text.rfind('\n') + 1]

    def rows(self) -> List[Dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self._text())))

    def by_key(self) -> Dict[Tuple[str, ...], Dict[str, str]]:
        """The rows by what identifies a run."""
        return {identity(row): row for row in self.rows()}

    def find(self, key: Mapping[str, str]) -> Optional[Dict[str, str]]:
        """The row of a run, None if it is not there."""
        return self.by_key().get(identity(key))

    def append(self, row: Mapping[str, str]) -> None:
        """Add a row. It is on the disk when this returns."""
        line = io.StringIO()
        writer = csv.DictWriter(line, fieldnames=COLUMNS, restval='', lineterminator='\n')
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with self.lock:
            whole = len(self._text().encode())
            if not whole:
                writer.writeheader()
            writer.writerow(row)
            with open(self.path, 'ab') as f:
                f.truncate(whole)
                f.write(line.getvalue().encode())
                f.flush()
                os.fsync(f.fileno())


def identity(row: Mapping[str, str]) -> Tuple[str, ...]:
    """What identifies the run of a row."""
    return tuple(row[name] for name in KEY)


def score_of(row: Mapping[str, str], kind: str) -> float:
    """The score of a run that chooses. That of a run that diverged is the worst of all."""
    return float('-inf') if row['outcome'] == DIVERGED else float(row[next(iter(SCORES[kind]))])


def choice_of(cell: Cell, kind: str, rows: Mapping[Tuple[str, ...], Mapping[str, str]]) -> Optional[Choice]:
    """What the tuning of a cell chose, None if a run of it is missing in the rows."""

    def score(run: Run) -> float:
        return score_of(rows[identity(run.key)], kind)

    try:
        return tune(cell, score)
    except KeyError:
        return None


def num_missing(cell: Cell, kind: str, results: Results) -> int:
    """Number of runs of a cell that are not in the results, without learning rates beyond its own."""
    rows = results.by_key()
    missing = sum(identity(run.key) not in rows for run in runs_to_tune(cell, cell.lrs))
    choice = choice_of(cell, kind, rows)
    if choice is None:
        return missing + len(cell.test.seeds)
    return sum(identity(run.key) not in rows for run in runs_to_test(cell, choice).values())
