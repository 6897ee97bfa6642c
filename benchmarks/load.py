#!/usr/bin/env python3
"""What does checking a checkpoint cost over timm.models.load_checkpoint?

    python benchmarks/load.py

prints one Markdown table. The two load a file of timm's own names into the same model, in turns, after one load of each
that is not counted. The file lies in the system's file cache. Seconds are those of one call, as wall time and as CPU
time; memory is what it adds at its peak to the resident memory before it, in sizes of the model, mapped pages of the
file included.

A third way, "bare", sums each tensor of a safetensors file and copies them into the model afterwards, with nothing
around it: what a load takes at least that leaves the model alone until all values are known to be finite.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

import timm
import torch
from safetensors.torch import save_file

MODELS = ('resnet18', 'vit_base_patch16_224', 'vit_large_patch16_224')
FORMATS = ('safetensors', 'pth')

LOAD = """
import json, logging, math, sys, time, timm, torch
from safetensors.torch import load_file
from timm.models import load_checkpoint as of_timm
from timm_coretune import load_checkpoint as of_coretune
logging.disable(logging.WARNING)
name, file, runs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = timm.create_model(name)
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())

def memory(key):
    with open('/proc/self/status') as f:
        return 1024 * int(next(line.split()[1] for line in f if line.startswith(key)))

def measure(load, **arguments):
    before = memory('VmRSS')
    open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
    wall, cpu = time.perf_counter(), time.process_time()
    load(model, file, **arguments)
    return time.perf_counter() - wall, time.process_time() - cpu, (memory('VmHWM') - before) / size

@torch.no_grad()
def bare(model, file):
    tensors, state = load_file(file), model.state_dict()
    assert all(math.isfinite(tensor.sum()) for tensor in tensors.values())
    for name, tensor in tensors.items():
        state[name].copy_(tensor)

ways = {'timm': (of_timm, {}), 'ours': (of_coretune, {'load_classifier': True})}
if file.endswith('safetensors'):
    ways['bare'] = (bare, {})
results = []
for run in range(int(runs) + 1):
    order = list(ways)[:: 1 if run % 2 else -1]
    results.append({name: measure(ways[name][0], **ways[name][1]) for name in order})
print(json.dumps(results[1:]))
"""


def compare(name: str, file: str, runs: int, threads: int) -> str:
    """A row of the table. Ratios are medians over the rounds of loads that follow each other."""
    command = [sys.executable, '-c', LOAD, name, file, str(runs), str(threads)]
    rounds = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def ratio(way: str, i: int) -> str:
        return f'{statistics.median(each[way][i] / each["timm"][i] for each in rounds):.2f}' if way in rounds[0] else ''

    ours, of_timm = ([statistics.median(each[way][i] for each in rounds) for i in range(3)] for way in ('ours', 'timm'))
    return (
        f'| {name}, {file.rsplit(".")[-1]} | {ratio("ours", 0)} | {ratio("bare", 0)} | {ratio("ours", 1)} '
        f'| {ratio("bare", 1)} | {ours[0]:.3f} / {of_timm[0]:.3f} | {ours[1]:.3f} / {of_timm[1]:.3f} '
        f'| {ours[2]:.2f} / {of_timm[2]:.2f} |'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=9, metavar='N', help='pairs of loads (default: 9)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='of torch')
    args = parser.parse_args()
    if not sys.platform.startswith('linux'):
        parser.error('memory is read from /proc, which only Linux has')

    print(
        '| load | wall against timm | bare | CPU against timm | bare | wall, s | CPU, s | memory added, ours / timm |'
    )
    print('|---|---|---|---|---|---|---|---|')
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
