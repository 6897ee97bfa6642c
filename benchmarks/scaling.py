#!/usr/bin/env python3
"""What do more processes cost a training step?

    python benchmarks/scaling.py

runs steps of a resnet50 with Core-tuning on 1, 2 and 4 processes of one thread each, all with the same batch a process,
over gloo. It prints one Markdown table: the bytes of the tensors that a process gathers and sums in a step, beside the
gradients of DistributedDataParallel, counted and by the formulas of docs/cost.md; the share of the step that these
exchanges take; and the CPU seconds of a process, against those of one process.

    python benchmarks/scaling.py --formula

prints what the formulas say of 8 to 1,024 GPUs. Nothing is run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Dict, List, Tuple

import timm
import torch
import torch.distributed as dist
from step import describe_machine

from timm_coretune import CoreTuningTask, distributed

NUM_CLASSES, PROJECTION_DIM = 100, 256


def count_exchanges() -> Dict[str, float]:
    """Count calls, bytes of the tensors that are gathered or summed, and seconds, of all exchanges of this package."""
    counts = {'calls': 0, 'bytes': 0, 'seconds': 0.0}

    def counted(run: Any) -> Any:
        def wrapper(x: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            result = run(x)
            counts['seconds'] += time.perf_counter() - started
            counts['calls'] += 1
            counts['bytes'] += max(x.numel() * x.element_size(), result.numel() * result.element_size())
            return result

        return wrapper

    distributed._all_gather = counted(distributed._all_gather)
    distributed._sum_scatter = counted(distributed._sum_scatter)
    return counts


def exchanged_bytes(num_rows: int, width: int, num_classes: int, itemsize: int = 4) -> Tuple[int, int]:
    """Bytes of the global batch that a step gathers forward and sums backward, by the formulas of docs/cost.md."""
    forward = 8 + itemsize * (width + num_classes) + 4 * PROJECTION_DIM
    backward = 4 * (width + num_classes + PROJECTION_DIM)
    return num_rows * forward, num_rows * backward


def report_formulas(width: int = 2048, num_classes: int = 1000, forward_flops: float = 4.1e9) -> None:
    """The table of large runs: resnet50 at 224 px, bfloat16."""
    print(
        '| GPUs | images a GPU | contrasted | gathered, MB | summed, MB | at 50 GB/s, ms | mining, TFLOP | '
        'contrast, TFLOP | network, TFLOP | memory of the gathered, GB |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    for num_processes, batch_size in ((8, 256), (64, 256), (256, 256), (1024, 256), (1024, 1024)):
        num_rows = num_processes * batch_size
        forward, backward = exchanged_bytes(num_rows, width, num_classes, itemsize=2)
        pairs = batch_size * num_rows
        print(
            f'| {num_processes:,} | {batch_size:,} | {num_rows:,} | {forward / 1e6:,.0f} | {backward / 1e6:,.0f} | '
            f'{(forward + backward) / 50e9 * 1e3:.1f} | {2 * pairs * width / 1e12:.3g} | '
            f'{10 * pairs * PROJECTION_DIM / 1e12:.3g} | {3 * 2 * forward_flops * batch_size / 1e12:.3g} | '
            f'{forward / 1e9:.2f} |'
        )


def work(rank: int, world_size: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = CoreTuningTask(
        timm.create_model('resnet50', num_classes=NUM_CLASSES), projection_dim=PROJECTION_DIM, verbose=False
    )
    if world_size > 1:
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=args.port, RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group('gloo')
        task = task.prepare_distributed()
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
    input = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    target = torch.arange(args.batch_size) % NUM_CLASSES
    counts = count_exchanges()
    found: Dict[str, List[float]] = {'wall': [], 'cpu': [], 'calls': [], 'bytes': [], 'seconds': []}
    for _ in range(args.steps + 1):
        if world_size > 1:
            dist.barrier()  # waiting for a process that comes late is no cost of the exchange
        counts.update(calls=0, bytes=0, seconds=0.0)
        wall, cpu = time.perf_counter(), time.process_time()
        task(input, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        step = {'wall': time.perf_counter() - wall, 'cpu': time.process_time() - cpu, **counts}
        for name, values in found.items():
            values.append(step[name])
    if rank == 0:
        medians = {name: statistics.median(values[1:]) for name, values in found.items()}
        num_rows = world_size * args.batch_size if world_size > 1 else 0
        expected = sum(exchanged_bytes(num_rows, task.criterion.num_features, NUM_CLASSES))
        print(*medians.values(), expected)
    if world_size > 1:
        dist.destroy_process_group()


def run(world_size: int) -> List[float]:
    """What process 0 of so many printed."""
    command = [sys.executable, *sys.argv, '--world-size', str(world_size), '--rank']
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(world_size)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f'{world_size} processes failed: {[process.returncode for process in processes]}')
    return [float(number) for number in outputs[0].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=32, metavar='N', help='images a process (default: 32)')
    parser.add_argument('--img-size', type=int, default=96, metavar='N', help='image size (default: 96)')
    parser.add_argument('--steps', type=int, default=5, metavar='N', help='steps that are timed (default: 5)')
    parser.add_argument('--port', default='29577', metavar='N', help='where the processes meet (default: 29577)')
    parser.add_argument('--formula', action='store_true', help='only what the formulas say of many GPUs')
    parser.add_argument('--rank', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--world-size', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        work(args.rank, args.world_size, args)
        return
    if args.formula:
        report_formulas()
        return
    print(
        '| processes | exchanges | MB gathered and summed | by formula | share of the step | CPU s a process | ratio |'
    )
    print('|---|---|---|---|---|---|---|')
    alone = None
    for world_size in (1, 2, 4):
        wall, cpu, calls, num_bytes, seconds, expected = run(world_size)
        alone = alone or cpu
        print(
            f'| {world_size} | {calls:.0f} | {num_bytes / 1e6:.3f} | {expected / 1e6:.3f} | '
            f'{100 * seconds / wall:.2f} % | {cpu:.3g} | {cpu / alone:.3f} |',
            flush=True,
        )
    print(
        f'\n{describe_machine()}, 1 thread a process; resnet50 at {args.img_size} px, {args.batch_size} images a '
        f'process, width 2048; medians of {args.steps} steps, waiting for other processes included'
    )


if __name__ == '__main__':
    main()
