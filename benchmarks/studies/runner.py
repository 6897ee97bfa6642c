"""Does the runs of a study that are not in its results"""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, Mapping

from .plan import SCORES, Cell, Run, Study, make_run, runs_to_test, tune
from .results import Results, num_missing, score_of
from .train import Forge, TrainError


def find_machine() -> str:
    """The model of the processor and the number of cores."""
    model = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = [line.partition(':')[2].strip() for line in f if line.startswith('model name')]
        model = names[0] if names else model
    return f'{model} x {os.cpu_count()}'


def find_versions() -> Dict[str, str]:
    """Versions of what trains: the commit of timm_coretune, or its version where there is no git, torch and timm."""
    spec = importlib.util.find_spec('timm_coretune')
    folder = os.path.dirname(spec.origin)
    git = ['git', '-C', folder]
    head = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    commit = head.stdout.strip() or importlib.metadata.version('timm-coretune')
    if subprocess.run([*git, 'status', '--porcelain', '--', folder], capture_output=True).stdout:
        commit += '-changed'
    return {
        'commit': commit,
        'machine': find_machine(),
        **{name: importlib.metadata.version(name) for name in ('torch', 'timm')},
    }


class Runner:
    """Does the runs of a study that are not in its results yet.

    Args:
        study: The study.
        results: Where the results are.
        forge: Starts the processes.
        places: Folders of this machine, by the names that the flags have for them.
    """

    def __init__(self, study: Study, results: Results, forge: Forge, places: Mapping[str, str]):
        self.study = study
        self.results = results
        self.forge = forge
        self.places = places
        self.versions = find_versions()
        self.failures: List[str] = []
        self.num_done = 0
        self.num_left = 0
        self.start = time.perf_counter()
        self.lock = threading.Lock()

    def score(self, run: Run) -> float:
        row = self.results.find(run.key)
        return score_of(self.train(run) if row is None else row, self.study.kind)

    def train(self, run: Run) -> Dict[str, str]:
        """Train and write a line.

        Raises:
            TrainError: There is no result.
        """
        outcome = self.forge.train(run.words(self.places), f'{"-".join(run.key.values())}.txt'.replace('/', '_'))
        given = outcome.columns
        scores = {name: float(given[name]) for name in SCORES[self.study.kind] if name in given}
        row = {**run.key, **self.versions, 'outcome': given['outcome'], 'epochs': given.get('epochs', '')}
        row.update({name: f'{value:.4f}' for name, value in scores.items()})
        row.update(seconds=f'{outcome.seconds:.1f}', cpu_seconds=f'{outcome.cpu_seconds:.1f}')
        row['threads'] = str(self.forge.num_threads)
        self.results.append(row)
        with self.lock:
            self.num_done += 1
            spent = time.perf_counter() - self.start
            self.num_left = max(self.num_left, self.num_done)  # learning rates beyond the grid were not planned
            left = self.num_left - self.num_done
            shown = ', '.join(f'{name} {value:.2f}' for name, value in scores.items()) or row['outcome']
            print(
                f'[{self.num_done}/{self.num_left}] {run.name}: {shown} ({outcome.seconds:.0f} s; about '
                f'{left * spent / self.num_done / 3600:.1f} h left)',
                flush=True,
            )
        return row

    def study_cell(self, cell: Cell) -> None:
        """Tune an arm, then do its test runs. What fails is noted, and ends the tuning."""
        try:
            choice = tune(cell, self.score)
        except TrainError as e:
            self.note(f'{cell.data} {cell.network} {cell.labels} {cell.arm}, tuning: {e}')
            return
        for run in runs_to_test(cell, choice).values():
            try:
                self.score(run)
            except TrainError as e:
                self.note(f'{run.name}: {e}')

    def note(self, failure: str) -> None:
        with self.lock:
            self.failures.append(failure)
            print(f'failed: {failure}', file=sys.stderr, flush=True)
            with open(f'{self.results.path}.failures.txt', 'a', encoding='utf-8') as f:
                f.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {failure}\n')

    def leave_out_refused(self, cells: List[Cell]) -> List[Cell]:
        """The cells whose flags train.py takes. The others are noted as failed, before hours have passed."""
        lines = [make_run(cell, 'tune', cell.lrs[0], cell.weights[0], 0).words(self.places) for cell in cells]
        errors = self.forge.check(lines)
        for cell, error in zip(cells, errors, strict=True):
            if error:
                self.note(f'{cell.data} {cell.network} {cell.labels} {cell.arm} is left out: {error}')
        return [cell for cell, error in zip(cells, errors, strict=True) if not error]

    def run(self, cells: List[Cell], num_jobs: int) -> None:
        cells = self.leave_out_refused(cells)
        self.num_left = sum(num_missing(cell, self.study.kind, self.results) for cell in cells)
        self.start = time.perf_counter()
        pool = ThreadPoolExecutor(num_jobs)
        try:
            list(pool.map(self.study_cell, cells))
        except KeyboardInterrupt:
            print('Stopped. The same command continues.', file=sys.stderr, flush=True)
            os._exit(130)  # the threads wait for processes, which end with this one
