#!/usr/bin/env python3
"""Is Core-tuning better than cross-entropy tuning on the bundled sample?

    python benchmarks/compare.py

runs train.py with and without --coretune, with the sample's recipe, 400 labels a class and paired seeds. It prints
top-1 accuracy on the sample's validation images as a Markdown table: of the last epoch, which no choice on those images
favours, and of the best. All runs have the recipe's learning rate; benchmarks/study.py tunes it.
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


def print_table(results: Dict[str, List[List[float]]]) -> None:
    """Print the top-1 of every epoch of every run of every arm."""
    seeds = f'seeds 0 to {len(results["cross-entropy"]) - 1}'
    print(f'| tuning | top-1, last epoch, {seeds} | mean | minus cross-entropy, paired | best epoch |')
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
    parser.add_argument('flags', nargs='*', metavar='FLAG', help='further flags of train.py for all runs, after --')
    args = parser.parse_args()
    num_threads = max(1, (os.cpu_count() or 1) // args.jobs)

    def train(seed: int, name: str) -> List[Dict[str, str]]:
        rows = run([*_ARMS[name], *args.flags], seed, num_threads)
        print(f'seed {seed}, {name}: {rows[-1]}', file=sys.stderr)
        return rows

    runs = [(seed, name) for seed in range(args.seeds) for name in _ARMS]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(runs, pool.map(train, *zip(*runs, strict=True)), strict=True))
    summaries = {name: [done[seed, name] for seed in range(args.seeds)] for name in _ARMS}
    print_table(
        {name: [[float(row['eval_top1']) for row in rows] for rows in runs] for name, runs in summaries.items()}
    )
    print('± is the standard error of the mean of the paired differences.')


if __name__ == '__main__':
    main()
