#!/usr/bin/env python3
"""When does Core-tuning help? Trains arms on data and networks, with tuned learning rates and paired seeds.

    python benchmarks/study.py benchmarks/study.yaml --results benchmarks/results/images.csv --data-root DIR

runs train.py with the flags of the file, for each data set, network, share of labels and arm: first every learning rate
and strength, trained on `train` and validated on `val`, then the best of them with the seeds of the test, trained on
`train` and validated on `test`. Only the last epoch counts. Each run is a line of the CSV file. A run that is in the
file with the same flags is not done again, so the command continues a study that was stopped.

    python benchmarks/study.py benchmarks/study.yaml --results benchmarks/results/images.csv --report docs/study.md

writes the tables of docs/study.md, and --picture FILE draws the differences. --dry-run lists what is left to do.

    python benchmarks/study.py --smoke

makes a study of generated pictures and of nothing that matters, to see whether all of this works.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, Mapping, Optional

from study_picture import draw
from study_plan import SCORES, Cell, Run, Study, make_run, read_study, select, tune
from study_report import render, write_tables
from study_results import Results, num_missing, score_of
from study_smoke import write_study
from study_train import Forge, TrainError

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'timm_coretune', 'assets')


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
        for seed in cell.test.seeds:
            run = make_run(cell, 'test', choice.lr, choice.weight, seed)
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


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('study', nargs='?', metavar='YAML', help='file of the study')
    add('--results', metavar='FILE', help='CSV file with a line for each run')
    add('--data-root', default='{data}', metavar='DIR', help='folder of the data, {data} in the file of the study')
    add('--networks-root', default='{networks}', metavar='DIR', help='folder of the weights, {networks} in the file')
    add('--only', nargs='+', default=[], metavar='AXIS=NAME', help='part of the study, such as data=letters,arm=scl')
    add('--jobs', type=int, default=1, metavar='N', help='runs at a time (default: 1)')
    add('--threads', type=int, default=1, metavar='N', help='threads of a run (default: 1)')
    add('--dry-run', action='store_true', help='list what is left to do, with a command of each cell')
    add('--report', nargs='?', const='-', metavar='FILE', help='write the tables into a page, or print them')
    add('--picture', metavar='FILE', help='draw the differences as PNG or SVG')
    add('--smoke', action='store_true', help='do a tiny study of generated pictures')
    args = parser.parse_args(argv)
    if not args.smoke and not (args.study and args.results):
        parser.error('expected the YAML file of a study and --results FILE, or --smoke')
    return args


def show_plan(study: Study, cells: List[Cell], results: Results, places: Mapping[str, str]) -> None:
    """Print the number of runs that are left, the command of a run of each cell, and the time if others tell it."""
    total, unknown, hours = 0, 0, 0.0
    seconds: Dict[tuple, List[float]] = {}
    for row in results.rows():
        seconds.setdefault((row['data'], row['network'], row['labels']), []).append(float(row['cpu_seconds']))
    for cell in cells:
        left = num_missing(cell, study.kind, results)
        known = seconds.get((cell.data, cell.network, cell.labels))
        total += left
        hours += left * statistics.mean(known) / 3600 if known else 0
        unknown += 0 if known else left
        print(f'{left:3d} runs: {cell.data}, {cell.network}, {cell.labels}, {cell.arm}')
        words = make_run(cell, 'tune', cell.lrs[0], cell.weights[0], cell.tune.seeds[0]).words(places)
        print(f'     {shlex.join(["train.py", *words])}')
    print(
        f'{total:.0f} runs are left, not counting those with learning rates beyond the grid: {hours:.1f} h of compute'
    )
    if unknown:
        print(f'and that of {unknown} runs on data, networks and labels of which no run is done yet.')


def smoke(folder: str) -> int:
    """Do a tiny study, then ask for it again, which must train nothing. Returns the exit code."""
    words = write_study(folder)
    code = main([*words, '--jobs', '2'])
    results = Results(words[words.index('--results') + 1])
    before = results.rows()
    code = code or main(words)
    if results.rows() != before:
        print('Expected that a study that is over trains nothing.', file=sys.stderr)
        return 1
    return code or main([*words, '--report', '--picture', os.path.join(folder, 'picture.png')])


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            return smoke(folder)
    study, results = read_study(args.study), Results(args.results)
    cells = select(study.cells, args.only)
    places = {'data': args.data_root, 'networks': args.networks_root, 'assets': ASSETS}
    if args.report or args.picture:
        if args.report:
            write_tables(render(study, cells, results), args.study, args.report)
        if args.picture:
            draw(study, cells, results, args.picture)
        return 0
    if args.dry_run:
        show_plan(study, cells, results, places)
        return 0
    runner = Runner(study, results, Forge(args.threads, f'{args.results}.logs'), places)
    runner.run(cells, args.jobs)
    print(f'{runner.num_done} runs done, {len(runner.failures)} failed. Results: {args.results}')
    for failure in runner.failures:
        print(f'failed: {failure}', file=sys.stderr)
    return 1 if runner.failures else 0


if __name__ == '__main__':
    sys.exit(main())
