#!/usr/bin/env python3
"""What does a step on 8 times the images cost, computed in chunks by CachedStep?

    python benchmarks/grad_cache.py

prints one Markdown table. For each model it measures training steps with Core-tuning (forward, backward, update): one
batch, 8 batches that are contrasted together (CachedStep), the same with images that wait as bytes and are normalised a
batch at a time, and 8 batches that are accumulated, each contrasted by itself.

- Memory is the greatest that a process has in a step (on a GPU: that its tensors take), above what it has before the
  step: model and state of the optimizer are there, images and gradients are not. Each is measured in a process of its
  own, which gives memory back to the system as soon as it is free. All of it went through a step of 2 images before.
- Time is CPU seconds, user and system (on a GPU: wall seconds), of steps that alternate. Ratios are medians of those to
  the step of one batch of the same round.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Callable, Dict, List, Tuple

import psutil
import timm
import torch
from step import describe_machine

from timm_coretune import CachedStep, CoreTuningTask

FACTOR = 8
KINDS = ('one batch', 'CachedStep', 'CachedStep, bytes', 'accumulated')
NUM_CLASSES = 100


def normalize(images: torch.Tensor) -> torch.Tensor:
    return images.float().sub_(127.5).div_(58.0)


class Step:
    """A training step of a timm model. It makes its images in the first call, and has made a step of 2 images before.

    Args:
        kind: One of KINDS.
        name: Name of the model.
        batch_size: Images of one batch.
        device: Device.
        amp: Autocast in bfloat16.
    """

    def __init__(self, kind: str, name: str, batch_size: int, device: torch.device, amp: bool):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=NUM_CLASSES).to(device)
        self.task = CoreTuningTask(model, device=device, verbose=False).train()
        self.optimizer = torch.optim.SGD(self.task.trainable_module.parameters(), lr=1e-4, momentum=0.9)
        self.with_bytes = 'bytes' in kind
        prepare = normalize if self.with_bytes else None
        self.cached = CachedStep(self.task, prepare=prepare) if 'CachedStep' in kind else None
        self.num_batches = 1 if kind == 'one batch' else FACTOR
        self.batch_size, self.input_size = batch_size, model.pretrained_cfg['input_size']
        self.device, self.amp = device, amp
        self.batches: List[Tuple[torch.Tensor, torch.Tensor]] = []
        self._update([self._draw(2)])

    def __call__(self) -> None:
        if not self.batches:
            self.batches = [self._draw(self.batch_size) for _ in range(self.num_batches)]
        self._update(self.batches)

    def _draw(self, batch_size: int) -> Tuple[torch.Tensor, torch.Tensor]:
        shape, target = (batch_size, *self.input_size), torch.randint(NUM_CLASSES, (batch_size,), device=self.device)
        if self.with_bytes:
            return torch.randint(256, shape, device=self.device, dtype=torch.uint8), target
        return torch.randn(shape, device=self.device), target

    def _update(self, batches: List[Tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            if self.cached is not None:
                self.cached(*zip(*batches, strict=True))
            else:
                for images, target in batches:
                    (self.task(images, target)['loss'] / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_peak(kind: str, name: str, batch_size: int, device: torch.device, amp: bool) -> float:
    """Greatest memory of a step above that before it, in MiB. Call it once in a process."""
    step = Step(kind, name, batch_size, device, amp)
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = psutil.Process().memory_info().rss
    step()
    if device.type == 'cuda':
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20


def peak_of_process(kind: str, arguments: List[str]) -> float:
    """`measure_peak` in a process of its own."""
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
    command = [sys.executable, __file__, '--measure', kind, *arguments]
    return json.loads(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout)


def time_ratios(steps: Dict[str, Callable], num_rounds: int, device: torch.device) -> Dict[str, Tuple[float, float]]:
    """Median seconds of each step, and the median of its ratios to the first one, in alternating runs."""

    def seconds(step: Callable) -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize()
        clock = time.perf_counter if device.type == 'cuda' else time.process_time
        start = clock()
        step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return clock() - start

    rounds = [{kind: seconds(step) for kind, step in steps.items()} for _ in range(num_rounds)]
    first = next(iter(steps))
    return {
        kind: (
            statistics.median(times[kind] for times in rounds),
            statistics.median(times[kind] / times[first] for times in rounds),
        )
        for kind in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'vit_tiny_patch16_224'], help='timm models')
    parser.add_argument('--batch-size', type=int, default=16, metavar='B', help='images of one batch (default: 16)')
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='rounds of timed steps (default: 5)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast around the forward passes')
    parser.add_argument('--measure', choices=KINDS, help='print the memory of one kind of step of the first model')
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.measure:
        print(json.dumps(measure_peak(args.measure, args.models[0], args.batch_size, device, args.amp)))
        return
    peaks = {}
    for name in args.models:  # before this process grows: a new process reports at least the memory of its parent
        flags = ['--models', name, '--batch-size', str(args.batch_size), '--device', args.device]
        for kind in KINDS:
            peaks[name, kind] = peak_of_process(kind, flags + ['--amp'] * args.amp)
    print('| model | step | images | memory, MiB | memory / one batch | seconds | time / one batch |')
    print('|---|---|---|---|---|---|---|')
    for name in args.models:
        steps = {kind: Step(kind, name, args.batch_size, device, args.amp) for kind in KINDS}
        times = time_ratios(steps, args.rounds, device)
        for kind in KINDS:
            num_images = args.batch_size * (1 if kind == KINDS[0] else FACTOR)
            peak = peaks[name, kind]
            print(
                f'| {name} | {kind} | {num_images} | {peak:.0f} | {peak / peaks[name, KINDS[0]]:.2f} | '
                f'{times[kind][0]:.3g} | {times[kind][1]:.2f} |',
                flush=True,
            )
    print(f'\n{describe_machine(device)}; median of {args.rounds} rounds')


if __name__ == '__main__':
    main()
