#!/usr/bin/env python3
"""Is Core-tuning better than cross-entropy tuning on the bundled sample?

    python benchmarks/compare.py

runs train.py with and without --coretune, with the sample's recipe and paired seeds, and prints one Markdown table of
top-1 accuracy on the sample's validation images: the last epoch, which no choice on those images favours, and the best.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Dict, List, Tuple

_ARMS: Dict[str, List[str]] = {
    'cross-entropy': [],
    'Core-tuning, weight 0.1 (the paper)': ['--coretune', '--contrast-weight', '0.1'],
    'Core-tuning, weight 1 (the recipe)': ['--coretune'],
}


def run(flags: List[str], seed: int) -> Tuple[float, float]:
    """Train once; top-1 in percent of the last and of the best epoch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'timm_coretune.train', '--seed', str(seed), '--output', folder]
        finished = subprocess.run([*command, '--experiment', 'run', *flags], capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f'{" ".join(command + flags)} failed:\n{finished.stderr[-2000:]}')
        with open(os.path.join(folder, 'run', 'summary.csv'), newline='') as f:
            top1 = [float(row['eval_top1']) for row in csv.DictReader(f)]
    return top1[-1], max(top1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, metavar='N', help='runs of each arm (default: 5)')
    parser.add_argument('flags', nargs='*', metavar='FLAG', help='further flags of train.py for all runs, after --')
    args = parser.parse_args()
    results = {name: [] for name in _ARMS}
    for seed in range(args.seeds):
        for name, flags in _ARMS.items():
            results[name].append(run([*flags, *args.flags], seed))
            print(f'seed {seed}, {name}: {results[name][-1]}', file=sys.stderr)

    baseline = [last for last, _ in results['cross-entropy']]
    print(
        f'| tuning | top-1, last epoch, seeds 0 to {args.seeds - 1} | mean | minus cross-entropy, paired | best epoch |'
    )
    print('|---|---|---|---|---|')
    for name, pairs in results.items():
        last = [a for a, _ in pairs]
        difference = [a - b for a, b in zip(last, baseline, strict=True)]
        error = statistics.stdev(difference) / len(difference) ** 0.5 if len(difference) > 1 else float('nan')
        paired = '' if name == 'cross-entropy' else f'{statistics.mean(difference):+.2f} ± {error:.2f}'
        print(
            f'| {name} | {", ".join(f"{a:.1f}" for a in last)} | {statistics.mean(last):.2f} | {paired} | '
            f'{statistics.mean(best for _, best in pairs):.2f} |'
        )
    print('\n± is the standard error of the mean of the paired differences.')


if __name__ == '__main__':
    main()
