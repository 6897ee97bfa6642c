#!/usr/bin/env python3
"""Does a run that is killed at any moment end with the weights of one that is not?

    python benchmarks/kill_resume.py
    python benchmarks/kill_resume.py --processes 2

trains without a break, then again and again with kill -9 at random moments and --resume auto, and compares weights,
moving average, summary and best weights bit by bit. Prints one Markdown table.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Dict, List

import psutil
import torch

_RECIPE = (
    *('--coretune', '--model-ema', '--model-ema-decay', '0.9', '--epochs', '3', '--recovery-interval', '3'),
    *('--reprob', '0.3', '--mixup', '0.2', '--color-jitter', '0.2', '--drop', '0.1', '--checkpoint-hist', '3'),
    *('--log-interval', '1000', '--label-fraction', '0.5'),
)


# one thread a process: the network is tiny, and several runs may share the machine
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def make_command(processes: int, flags: List[str], with_recipe: bool = True) -> List[str]:
    """The command that trains with so many processes, by the recipe of this file or with the flags alone."""
    launcher = [sys.executable, '-m']
    if processes > 1:
        launcher = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            str(processes),
            '-m',
        ]
    recipe = ('--device', 'cpu', *_RECIPE) if with_recipe else ()
    return [*launcher, 'timm_coretune.train', *recipe, *flags]


def fingerprint(folder: str) -> Dict[str, str]:
    """Hashes of what must be the same."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(os.path.join(folder, 'last.pth.tar'), map_location='cpu', weights_only=True)
    prints = {}
    for name in ('state_dict', 'state_dict_ema', 'task_state'):
        digest = hashlib.sha256()
        tensors = state[name] if name != 'task_state' else {**state[name]['projector'], '': state[name]['generator']}
        for key, value in sorted(tensors.items()):
            digest.update(key.encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        prints[name] = digest.hexdigest()
    for name in ('summary.csv', 'model_best.safetensors'):
        with open(os.path.join(folder, name), 'rb') as f:
            prints[name] = hashlib.sha256(f.read()).hexdigest()
    return prints


def kill_all(process: subprocess.Popen) -> None:
    """Kill -9 a run: its launcher, the processes of it, which have sessions of their own, and their loader workers."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everyone[:-1], timeout=30)


def is_killed(command: List[str], seconds: float) -> bool:
    """Start a run and kill it after so many seconds. Whether it was still running."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        return True
    if process.returncode:
        raise SystemExit('A run failed by itself.')
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, metavar='N', help='runs that are killed once (default: 20)')
    parser.add_argument('--processes', type=int, default=1, metavar='N', help='processes (default: 1)')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 2], metavar='N', help='of the loaders, in turn')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the moments (default: 0)')
    args = parser.parse_args()
    draws = random.Random(args.seed)
    print('| run | processes | workers | killed after, recovery states then | same as unbroken |')
    print('|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as output:
        started = time.monotonic()
        command = make_command(args.processes, ['--output', output, '--experiment', 'unbroken', '-j', '0'])
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
        seconds = time.monotonic() - started
        expected = fingerprint(os.path.join(output, 'unbroken'))
        identical = 0
        for number in range(args.kills):
            workers = args.workers[number % len(args.workers)]
            folder = os.path.join(output, str(number))
            flags = ['--output', output, '--experiment', str(number), '--resume', 'auto', '-j', str(workers)]
            command = make_command(args.processes, flags)
            while not is_killed(command, moment := draws.uniform(0.2, 1.0) * seconds):
                seconds = moment  # it was over before
                shutil.rmtree(folder)
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []  # killed before it made one
            states = ' '.join(name[: -len('.pth.tar')] for name in names if 'recovery-' in name)
            subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
            found = fingerprint(folder)
            wrong = [name for name in expected if expected[name] != found[name]]
            identical += not wrong
            verdict = ', '.join(wrong) + ' differ' if wrong else 'yes'
            print(
                f'| {number} | {args.processes} | {workers} | {moment:.1f} s, {states or "-"} | {verdict} |', flush=True
            )
            shutil.rmtree(folder)
    print(f'\n{identical} of {args.kills} bit-identical; an unbroken run takes {seconds:.0f} s.')
    if identical != args.kills:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
