#!/usr/bin/env python3
"""Is Core-tuning better than cross-entropy tuning on the bundled sample?

    python benchmarks/compare.py
    python benchmarks/compare.py --segmentation

runs train.py with and without --coretune, with the sample's recipe and paired seeds, and prints a Markdown table for
each metric on the sample's validation images (top-1 accuracy; MPA, FWIoU and mIoU of pixels): the last epoch, which no
choice on those images favours, and the best. All runs have the recipe's learning rate: benchmarks/study.py tunes it.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List

_ARMS: Dict[str, List[str]] = {
    'cross-entropy': [],
    'Core-tuning, weight 0.1 (the paper)': ['--coretune', '--contrast-weight', '0.1'],
    'Core-tuning, weight 1': ['--coretune', '--contrast-weight', '1'],
}
_METRICS = {'top1': 'top-1'}
_PIXEL_METRICS = {'mpa': 'MPA', 'fwiou': 'FWIoU', 'miou': 'mIoU'}


def run(flags: List[str], seed: int, num_threads: int) -> List[Dict[str, str]]:
    """Train once; the rows of the summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'timm_coretune.train', '--seed', str(seed), '--output', folder]
        environment = {**os.environ, 'OMP_NUM_THREADS': str(num_threads)}
        words = [*command, '--experiment', 'run', *flags]
        finished = subprocess.run(words, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f'{" ".join(words)} failed:\n{finished.stderr[-2000:]}')
        with open(os.path.join(folder, 'run', 'summary.csv'), newline='') as f:
            return list(csv.DictReader(f))


def print_table(title: str, results: Dict[str, List[List[float]]]) -> None:
    """Print a metric of every epoch of every run of every arm."""
    seeds = f'seeds 0 to {len(results["cross-entropy"]) - 1}'
    print(f'| tuning | {title}, last epoch, {seeds} | mean | minus cross-entropy, paired | best epoch |')
    print('|---|---|---|---|---|')
    baseline = [epochs[-1] for epochs in results['cross-entropy']]
    for name, runs in results.items():
        last = [epochs[-1] for epochs in runs]
        difference = [a - b for a, b in zip(last, baseline, strict=True)]
        error = statistics.stdev(difference) / len(difference) ** 0.5 if len(difference) > 1 else float('nan')
        paired = '' if name == 'cross-entropy' else f'{statistics.mean(difference):+.2f} ± {error:.2f}'
        print(
            f'| {name} | {", ".join(f"{a:.1f}" for a in last)} | {statistics.mean(last):.2f} | {paired} | '
            f'{statistics.mean(max(epochs) for epochs in runs):.2f} |'
        )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, metavar='N', help='runs of each arm (default: 5)')
    parser.add_argument(
        '--jobs', type=int, default=1, metavar='N', help='runs at a time, which share the cores (default: 1)'
    )
    parser.add_argument('--segmentation', action='store_true', help='of the scenes made of the sample, by pixel')
    parser.add_argument('flags', nargs='*', metavar='FLAG', help='further flags of train.py for all runs, after --')
    args = parser.parse_args()
    flags = [*(['--segmentation'] if args.segmentation else []), *args.flags]
    num_threads = max(1, (os.cpu_count() or 1) // args.jobs)

    def train(seed: int, name: str) -> List[Dict[str, str]]:
        rows = run([*_ARMS[name], *flags], seed, num_threads)
        print(f'seed {seed}, {name}: {rows[-1]}', file=sys.stderr)
        return rows

    runs = [(seed, name) for seed in range(args.seeds) for name in _ARMS]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(runs, pool.map(train, *zip(*runs, strict=True)), strict=True))
    summaries = {name: [done[seed, name] for seed in range(args.seeds)] for name in _ARMS}
    for key, title in (_PIXEL_METRICS if args.segmentation else _METRICS).items():
        results = {
            name: [[float(row[f'eval_{key}']) for row in rows] for rows in runs] for name, runs in summaries.items()
        }
        print_table(title, results)
    print('± is the standard error of the mean of the paired differences.')


if __name__ == '__main__':
    main()
