#!/usr/bin/env python3
"""What does checking a checkpoint cost over timm.models.load_checkpoint?

    python benchmarks/load.py

prints one Markdown table. Each load runs in a process of its own, the two in turns, on a file of timm's own names that
lies in the system's file cache. Seconds are those of the one call; memory is what it adds at its peak to the resident
memory before it, in sizes of the model, mapped pages of the file included.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Dict, List, Tuple

import timm
import torch
from safetensors.torch import save_file

MODELS = ('vit_base_patch16_224', 'resnet50')
FORMATS = ('safetensors', 'pth')

LOAD = """
import sys, time, timm, torch
from timm.models import load_checkpoint as of_timm
from timm_coretune import load_checkpoint as of_coretune
torch.set_num_threads(int(sys.argv[4]))
which, name, file = sys.argv[1:4]
model = timm.create_model(name)
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())

def memory(key):
    with open('/proc/self/status') as f:
        return 1024 * int(next(line.split()[1] for line in f if line.startswith(key)))

before = memory('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
start = time.perf_counter()
if which == 'timm':
    of_timm(model, file)
else:
    of_coretune(model, file, load_classifier=True)
seconds = time.perf_counter() - start
print(seconds, (memory('VmHWM') - before) / size)
"""


def measure(which: str, name: str, file: str, threads: int) -> Tuple[float, float]:
    """Seconds and added memory of one load in a new process."""
    command = [sys.executable, '-c', LOAD, which, name, file, str(threads)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, memory = finished.stdout.split()
    return float(seconds), float(memory)


def compare(name: str, file: str, runs: int, threads: int) -> str:
    """A row of the table."""
    results: Dict[str, List[Tuple[float, float]]] = {'ours': [], 'timm': []}
    for run in range(-1, runs):  # the first reads the file into the cache
        for which in ('ours', 'timm') if run % 2 else ('timm', 'ours'):
            result = measure(which, name, file, threads)
            if run >= 0:
                results[which].append(result)
    (seconds, memory), (timm_seconds, timm_memory) = (
        [statistics.median(values) for values in zip(*results[which], strict=True)] for which in ('ours', 'timm')
    )
    return (
        f'| {name}, {file.rsplit(".")[-1]} | {seconds / timm_seconds:.2f} | {seconds:.3f} / {timm_seconds:.3f} '
        f'| {memory:.2f} / {timm_memory:.2f} |'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=7, metavar='N', help='loads of each (default: 7)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='of torch')
    args = parser.parse_args()
    if not sys.platform.startswith('linux'):
        parser.error('memory is read from /proc, which only Linux has')

    print('| load | time against timm | seconds, ours / timm | memory added, ours / timm |')
    print('|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            tensors = timm.create_model(name).state_dict()
            for form in FORMATS:
                file = os.path.join(folder, f'{name}.{form}')
                (save_file if form == 'safetensors' else torch.save)(tensors, file)
                print(compare(name, file, args.runs, args.threads), flush=True)
                os.remove(file)
    with open('/proc/cpuinfo') as f:
        cpu = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), platform.machine())
    print(f'\n{cpu}, {args.threads} threads, torch {torch.__version__}, timm {timm.__version__}, median of {args.runs}')


if __name__ == '__main__':
    main()
