#!/usr/bin/env python3
"""What share of a training step over two processes goes into gathering the global batch?

    python benchmarks/gather.py

trains resnet50 with Core-tuning in two gloo processes and prints one Markdown table: the time inside gathers, forward
and backward, against the whole step. Images are smaller than a user's, so the share is larger than his.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import timm
import torch
import torch.distributed as dist
from step import describe_machine

from timm_coretune import CoreTuningTask, distributed


def time_gathers() -> list:
    """Make every gather add the seconds it takes, forward and backward, to the list that is returned."""
    seconds = []

    def timed(run):
        def wrapper(*args):
            started = time.perf_counter()
            result = run(*args)
            seconds.append(time.perf_counter() - started)
            return result

        return staticmethod(wrapper)

    distributed._AllGather.forward = timed(distributed._AllGather.forward)
    distributed._AllGather.backward = timed(distributed._AllGather.backward)
    return seconds


def work(rank: int, port: str, args: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    torch.manual_seed(0)
    task = CoreTuningTask(timm.create_model('resnet50', num_classes=100), verbose=False).prepare_distributed()
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
    input, target = torch.randn(args.batch_size, 3, args.img_size, args.img_size), torch.arange(args.batch_size) % 100
    gathers, steps, inside = time_gathers(), [], []
    for _ in range(args.steps + 1):
        dist.barrier()  # a gather that waits for the other process is not the gather's time
        gathers.clear()
        started = time.perf_counter()
        task(input, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - started)
        inside.append(sum(gathers))
    if rank == 0:
        step, gather = statistics.median(steps[1:]), statistics.median(inside[1:])
        print('| step over two processes | seconds | of these in gathers | share |')
        print('|---|---|---|---|')
        print(
            f'| resnet50 at {args.img_size} px, batch 2 x {args.batch_size}, width 2048 | {step:.3g} | {gather:.3g} | '
            f'{100 * gather / step:.2f} % |'
        )
        print(f'\n{describe_machine()}; median of {args.steps} steps, waiting for the other process included')
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='images a process (default: 64)')
    parser.add_argument('--img-size', type=int, default=96, metavar='N', help='image size (default: 96)')
    parser.add_argument('--steps', type=int, default=5, metavar='N', help='steps that are timed (default: 5)')
    parser.add_argument('--rank', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--port', default='29577', metavar='N', help='where the processes meet (default: 29577)')
    args = parser.parse_args()
    if args.rank is not None:
        work(args.rank, args.port, args)
        return
    processes = [subprocess.Popen([sys.executable, *sys.argv, '--rank', str(rank)]) for rank in range(2)]
    raise SystemExit(max(process.wait() for process in processes))


if __name__ == '__main__':
    main()
