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
import os
import shlex
import statistics
import sys
import tempfile
from typing import Dict, List, Mapping, Optional

from studies.file import read_study, select
from studies.picture import draw
from studies.plan import Cell, Study, make_run
from studies.report import render, write_tables
from studies.results import Results, num_missing
from studies.runner import Runner
from studies.smoke import write_study
from studies.train import Forge

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'timm_coretune', 'assets')


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
    add('--baseline', metavar='ARM', help='arm from which differences are taken (default: that of the file)')
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
    if args.baseline:
        arms = dict.fromkeys(cell.arm for cell in study.cells)
        if args.baseline not in arms:
            raise ValueError(f'Expected --baseline to be one of {", ".join(arms)}, got {args.baseline!r}.')
        study = study._replace(baseline=args.baseline)
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
