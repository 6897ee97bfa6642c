#!/usr/bin/env python3
"""Is train.py as fast as timm's own?

    python benchmarks/throughput.py --timm-train ../pytorch-image-models/train.py

runs both in turn on the bundled sample as a folder of PNGs, with the same model, loader and plain cross-entropy, and
prints one Markdown table of medians and of the median of the ratios pair by pair, with the least and the greatest:
images a second as both log them, seconds from the start of the process to the first logged step, peak resident memory,
and CPU seconds (user and system, of all processes of a run). Those between the first step of the second epoch and the
last step of the last one, over the images that are trained and validated on in between, are what an image costs. The
rest is what a run costs once, such as imports and pictures.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from typing import Dict, List, Tuple

import psutil
from PIL import Image
from safetensors import safe_open
from step import describe_machine

# timm's script with the installed timm, not with the one beside the script
_TIMM = 'import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = ""; runpy.run_path(sys.argv[0], run_name="__main__")'
_STEP = re.compile(r'Train: (\d+) \[ *(\d+)/.*?Time: [\d.]+s, +([\d.]+)/s')
_BATCH_SIZE = 64


def write_images(folder: str, num_images: int) -> None:
    """The first images of both splits of the sample, in one folder a class."""
    path = str(resources.files('timm_coretune') / 'assets' / 'fashion_mnist_sample.safetensors')
    with safe_open(path, framework='pt') as f:
        for split in ('train', 'validation'):
            images, labels = (f.get_tensor(f'{split}.{name}')[:num_images] for name in ('image', 'label'))
            for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                os.makedirs(os.path.join(folder, split, str(label)), exist_ok=True)
                Image.fromarray(image.numpy()).save(os.path.join(folder, split, str(label), f'{index}.png'))


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and its children."""
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


def measure(command: List[str], num_images: int) -> Dict[str, float]:
    """Run a training script, and read its log as it comes. num_images is the number of images of each split."""
    started, first, rates = time.perf_counter(), None, []
    steps: List[Tuple[int, int, float]] = []  # epoch, step and CPU seconds
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    with tempfile.TemporaryFile('w+') as rest:
        process = subprocess.Popen(command, stdout=rest, stderr=subprocess.PIPE, text=True, env=environment)
        log = []
        for line in process.stderr:
            log.append(line)
            match = _STEP.search(line)
            if match:
                first = first or time.perf_counter() - started
                rates.append(float(match[3]))
                if int(match[1]):
                    steps.append((int(match[1]), int(match[2]), cpu_seconds(psutil.Process(process.pid))))
        _, status, usage = os.wait4(process.pid, 0)
    if status or len(steps) < 3:
        raise SystemExit(f'{" ".join(command)} failed:\n{"".join(log[-30:])}')
    (epoch, step, start), (last_epoch, last_step, end) = steps[0], steps[-1]
    num_epochs = last_epoch - epoch
    between = num_epochs * 2 * num_images + (last_step - step) * _BATCH_SIZE
    total, an_image = usage.ru_utime + usage.ru_stime, (end - start) / between
    return {
        'images/s': statistics.median(rates[1:]),  # the first step of the run warms up
        'start, s': first,
        'peak, MiB': usage.ru_maxrss / 1024,
        'CPU ms an image': 1000 * an_image,
        'CPU s once a run': total - (last_epoch + 1) * 2 * num_images * an_image,
        f'CPU s of {last_epoch + 1} epochs': total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--timm-train', required=True, metavar='PATH', help="train.py of timm's repository")
    parser.add_argument('--pairs', type=int, default=5, metavar='N', help='alternating pairs of runs (default: 5)')
    parser.add_argument('--model', default='resnet18', metavar='NAME', help='timm model (default: resnet18)')
    parser.add_argument('--images', type=int, default=1280, metavar='N', help='training images (default: 1280)')
    parser.add_argument('--epochs', type=int, default=6, metavar='N', help='epochs, 3 or more (default: 6)')
    args = parser.parse_args()
    results: Dict[str, List[Dict[str, float]]] = {'ours': [], 'timm': []}
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, args.images)
        flags = [
            *('--data-dir', folder, '--model', args.model, '--num-classes', '10', '--img-size', '64'),
            *('-b', str(_BATCH_SIZE), '-j', '1', '--lr', '0.01', '--warmup-epochs', '0', '--log-interval', '2'),
            *('--device', 'cpu', '--output', os.path.join(folder, 'output'), '--epochs', str(args.epochs)),
        ]
        commands = {
            'ours': [sys.executable, '-m', 'timm_coretune.train', *flags],
            'timm': [sys.executable, '-c', _TIMM, os.path.abspath(args.timm_train), *flags],
        }
        for number in range(args.pairs):
            for name in sorted(commands, reverse=number % 2 == 1):
                results[name].append(measure(commands[name], args.images))
                print(f'{name}: {results[name][-1]}', file=sys.stderr)
    print('| what | ours | timm | ours / timm | from, to |')
    print('|---|---|---|---|---|')
    for what in results['ours'][0]:
        ours, timm = ([run[what] for run in results[name]] for name in ('ours', 'timm'))
        ratios = [a / b for a, b in zip(ours, timm, strict=True)]
        print(
            f'| {what} | {statistics.median(ours):.4g} | {statistics.median(timm):.4g} '
            f'| {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |'
        )
    print(f'\n{describe_machine()}; {args.model} at 64 px, batch 64, 1 loader worker; medians of {args.pairs} pairs')


if __name__ == '__main__':
    main()
