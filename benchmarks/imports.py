#!/usr/bin/env python3
"""Does `import timm_coretune` take longer than `import timm`, and `train.py --help` longer than timm's imports?

    python benchmarks/imports.py

prints one Markdown table. Each command runs in a process of its own, all in turns, after one round that is not counted.
timm's script is stood for by what it imports: torch, torchvision, and the modules of timm.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Dict, List, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = 'import argparse, torch, torchvision, yaml, timm.data, timm.layers, timm.loss, timm.models, timm.optim, '
SCRIPT += 'timm.scheduler, timm.task, timm.utils'
COMMANDS = {
    'import timm': ['-c', 'import timm'],
    'import timm_coretune': ['-c', 'import timm_coretune'],
    "what timm's script imports": ['-c', SCRIPT],
    'train.py --help': ['train.py', '--help'],
}
AGAINST = {'import timm_coretune': 'import timm', 'train.py --help': "what timm's script imports"}


def measure(arguments: List[str]) -> Tuple[float, float]:
    """Wall and CPU seconds of a new interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=9, metavar='N', help='runs of each command (default: 9)')
    args = parser.parse_args()
    results: Dict[str, List[Tuple[float, float]]] = {name: [] for name in COMMANDS}
    for run in range(args.runs + 1):
        for name, arguments in COMMANDS.items():
            result = measure(arguments)
            if run:
                results[name].append(result)
    print('| command | wall, s | CPU, s | wall against timm | CPU against timm |')
    print('|---|---|---|---|---|')
    for name, values in results.items():
        wall, cpu = (statistics.median(value[i] for value in values) for i in range(2))
        ratios = ['', '']
        if name in AGAINST:
            pairs = list(zip(values, results[AGAINST[name]], strict=True))
            ratios = [f'{statistics.median(ours[i] / of_timm[i] for ours, of_timm in pairs):.2f}' for i in range(2)]
        print(f'| `{name}` | {wall:.2f} | {cpu:.2f} | {ratios[0]} | {ratios[1]} |')


if __name__ == '__main__':
    main()
