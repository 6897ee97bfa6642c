#!/usr/bin/env python3
"""What do time and memory of the contrastive loss do when the batch grows?

    OMP_NUM_THREADS=1 python benchmarks/loss_memory.py

prints one Markdown table: forward and backward of the loss block by block, against the whole matrix of similarities
where that is small enough. N anchors are contrasted with each other and with an extra positive and an extra negative
each, as in Core-tuning. Each case runs in a process of its own, the two ways in turns. A process makes one pass with a
small batch, then the one that is measured. CPU seconds are those of the processor (user and system), wall seconds those
of the clock. The peak is what the pass adds to the memory that holds the inputs, gradients included.

    OMP_NUM_THREADS=1 python benchmarks/loss_memory.py --write

puts the table into docs/cost.md instead.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

import torch
from step import describe_machine

from timm_coretune.loss.parts.dense_contrast import dense_contrast
from timm_coretune.loss.streaming import streaming_contrast
from timm_coretune.mining import normalize

WAYS: Dict[str, Callable] = {'blocks': streaming_contrast, 'matrix': dense_contrast}
PAGE = Path(__file__).parents[1] / 'docs' / 'cost.md'
START, END = '<!-- table of loss_memory.py -->', '<!-- end of table -->'


def read_memory(key: str) -> float:
    """MiB of this process, as Linux counts them."""
    with open('/proc/self/status') as f:
        return int(next(line.split()[1] for line in f if line.startswith(key))) / 1024


def measure_here(way: str, num_rows: int, width: int, num_classes: int, device: torch.device) -> Dict[str, float]:
    """Seconds and MiB of one forward and backward pass in this process."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(num_rows, width, generator=generator).to(device).requires_grad_() for _ in range(3)]
    label = torch.randint(num_classes, (num_rows,), generator=generator).to(device)

    def run(num_rows: int) -> None:
        embedding, *extras = (normalize(x[:num_rows]) for x in inputs)
        losses = WAYS[way](embedding, label[:num_rows], slice(0, num_rows), *extras, None, 0.07, True)
        losses.mean().backward()
        for x in inputs:
            x.grad = None

    on_gpu = device.type == 'cuda'
    run(num_rows if on_gpu else 256)  # on a GPU kernels are compiled for the size
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = read_memory('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
    wall, cpu = time.perf_counter(), time.process_time()
    run(num_rows)
    if on_gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else read_memory('VmHWM')
    return {'cpu': cpu, 'wall': wall, 'peak': peak - before}


def measure(way: str, num_rows: int, width: int, args: argparse.Namespace) -> Dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, '--case', way, '--sizes', str(num_rows), '--widths', str(width)]
    command += ['--classes', str(args.classes), '--device', args.device]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout)


def median(runs: List[Dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def compare(num_rows: int, width: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    ways = ['blocks', 'matrix'] if num_rows <= args.matrix_up_to else ['blocks']
    num_runs = args.runs if num_rows < args.once_from else 1
    runs: Dict[str, List[Dict[str, float]]] = {way: [] for way in ways}
    for index in range(num_runs):
        for way in ways[:: -1 if index % 2 else 1]:
            runs[way].append(measure(way, num_rows, width, args))
    cells = [f'{num_rows:,}', str(width), str(num_runs)]
    for way in WAYS:
        found = runs.get(way)
        formats = (('cpu', '.3g'), ('wall', '.3g'), ('peak', '.0f'))
        cells += [format(median(found, key), digits) if found else '' for key, digits in formats]
    for key in ('cpu', 'peak'):
        ratios = [a[key] / b[key] for a, b in zip(runs['blocks'], runs.get('matrix', []), strict=False)]
        cells.append(f'{statistics.median(ratios):.2f}' if ratios else '')
    return f'| {" | ".join(cells)} |'


def write_table(lines: List[str]) -> None:
    """Replace the table of the page."""
    page = PAGE.read_text()
    before, rest = page.split(START)
    after = rest.split(END)[1]
    PAGE.write_text('\n'.join([f'{before}{START}', '', *lines, '', f'{END}{after}']))


def main(words: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [2**power for power in range(10, 17)]
    parser.add_argument('--sizes', type=int, nargs='+', default=sizes, metavar='N', help='anchors (default: 1k to 64k)')
    parser.add_argument('--widths', type=int, nargs='+', default=[128, 256], metavar='P', help='widths of embeddings')
    parser.add_argument('--classes', type=int, default=1000, metavar='N', help='number of classes (default: 1000)')
    parser.add_argument('--runs', type=int, default=3, metavar='N', help='runs of each way (default: 3)')
    parser.add_argument('--once-from', type=int, default=32768, metavar='N', help='one run from this size on')
    parser.add_argument(
        '--matrix-up-to',
        type=int,
        default=8192,
        metavar='N',
        help='largest size of the whole matrix, which takes 9 matrices of float32 (default: 8192, 2.3 GiB)',
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    parser.add_argument('--write', action='store_true', help='write the table into docs/cost.md')
    parser.add_argument('--case', choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.case:
        found = measure_here(args.case, args.sizes[0], args.widths[0], args.classes, torch.device(args.device))
        print(json.dumps(found))
        return
    lines = [
        '| N | P | runs | blocks: CPU s | wall s | MiB | matrix: CPU s | wall s | MiB | CPU ratio | MiB ratio |',
        f'|{"---|" * 11}',
    ]
    print('\n'.join(lines), flush=True)
    for width in args.widths:
        for num_rows in args.sizes:
            lines.append(compare(num_rows, width, args))
            print(lines[-1], flush=True)
    lines += ['', f'{describe_machine(torch.device(args.device))}; {args.classes} classes, medians of the runs']
    print('\n'.join(lines[-2:]))
    if args.write:
        write_table(lines)


if __name__ == '__main__':
    main()
