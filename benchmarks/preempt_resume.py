#!/usr/bin/env python3
"""Does a run that SIGTERM stops at any moment save its state, and end with the weights of one that is not stopped?

    python benchmarks/preempt_resume.py
    python benchmarks/preempt_resume.py --runs 4 --processes 2

trains without a break, then again and again with a SIGTERM at a random moment, one in three of them while the model is
validated. The command that the run prints continues it. Compares weights, moving average, summary and best weights bit
by bit. With several processes the signal goes to the launcher and to a single process in turn. No state is saved at
intervals. Prints one Markdown table.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from typing import Dict, List, NamedTuple, Optional

import psutil
import torch
from kill_resume import ENVIRONMENT, fingerprint, make_command

from timm_coretune.train.run.folder import find_newest_state, read_state

# less than what kill_resume.py trains, as every run starts twice, and no states but those of the signals
_SHORTER = ('--epochs', '2', '--label-fraction', '0.15', '-b', '32', '--recovery-interval', '0')
_FIRST_UPDATE = re.compile(r'Train: 0 \[ +0/')
_END_OF_TRAINING = re.compile(r'Train: (\d+) \[.*\(100%\)')
_LAST_SCORES = re.compile(r'Test \(EMA\): ')
_LAUNCHED = 'accelerate launch -m timm_coretune.train '
_TRAINED_BY = '-m timm_coretune.train'


class Line(NamedTuple):
    """A line of a log and when it came."""

    seconds: float
    text: str


class LoggedRun:
    """A run whose log is read while it trains."""

    def __init__(self, command: List[str]):
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines: List[Line] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.lines.append(Line(time.monotonic(), text.rstrip('\n')))

    def seconds_of(self, pattern: 're.Pattern[str]', count: int = 0) -> float:
        """When the line came that is the count-th to match, which is waited for. Infinity if the run ends before."""
        while True:
            is_over = self.process.poll() is not None
            if is_over:
                self.reader.join()
            found = [line.seconds for line in list(self.lines) if pattern.search(line.text)]
            if len(found) > count:
                return found[count]
            if is_over:
                return float('inf')
            time.sleep(0.005)

    def wait(self) -> int:
        """Wait for the end. Returns the exit status."""
        status = self.process.wait(300)
        self.reader.join()
        return status

    def count(self, pattern: 're.Pattern[str]') -> int:
        """Number of lines that match."""
        return sum(pattern.search(line.text) is not None for line in self.lines)

    @property
    def text(self) -> str:
        return '\n'.join(line.text for line in self.lines)


def trainers_of(launcher: psutil.Process) -> List[psutil.Process]:
    """The processes that a launcher started, without those that load data."""
    return [child for child in launcher.children() if _TRAINED_BY in ' '.join(child.cmdline())]


def stop(run: LoggedRun, single: Optional[int]) -> None:
    """Send SIGTERM to a run, or to a single one of its processes."""
    target = psutil.Process(run.process.pid)
    if single is not None:
        target = trainers_of(target)[single]
    target.send_signal(signal.SIGTERM)


def continuing_words(log: str) -> List[str]:
    """The words that follow the launcher in the command that a run prints when it is stopped."""
    lines = [line for line in log.split('\n') if line.startswith(_LAUNCHED)]
    if len(lines) != 1:
        raise SystemExit(f'Expected one command that continues, got {len(lines)} in:\n{log}')
    (line,) = lines
    return shlex.split(line.removeprefix(_LAUNCHED))


def place_of(folder: str) -> str:
    """Where a run was stopped, by its newest state."""
    path = find_newest_state(folder)
    if path is None:
        return 'nothing saved'
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = read_state(path)['run_state']
    if state['is_trained']:
        return f'validation of epoch {state["epoch"]}'
    return f'epoch {state["epoch"]}, batch {state["batch"]}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=20, metavar='N', help='runs that are stopped once (default: 20)')
    parser.add_argument('--processes', type=int, default=1, metavar='N', help='processes (default: 1)')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 2], metavar='N', help='of the loaders, in turn')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the moments (default: 0)')
    args = parser.parse_args()
    draws = random.Random(args.seed)
    print('| run | workers | SIGTERM to | stopped in | exit status | same as unbroken |')
    print('|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as output:

        def command(name: str, *flags: str) -> List[str]:
            return make_command(args.processes, [*_SHORTER, '--output', output, '--experiment', name, *flags])

        unbroken = LoggedRun(command('unbroken', '-j', '0'))
        if unbroken.wait():
            raise SystemExit(unbroken.text)
        num_epochs = unbroken.count(_END_OF_TRAINING)
        training = unbroken.seconds_of(_LAST_SCORES, num_epochs - 1) - unbroken.seconds_of(_FIRST_UPDATE)
        validation = unbroken.seconds_of(_LAST_SCORES) - unbroken.seconds_of(_END_OF_TRAINING)
        expected = fingerprint(os.path.join(output, 'unbroken'))
        good, num_validations = 0, 0
        for number in range(args.runs):
            name, workers = str(number), str(args.workers[number % len(args.workers)])
            folder = os.path.join(output, name)
            single = None if args.processes == 1 or number % 2 == 0 else draws.randrange(args.processes)
            while True:
                run = LoggedRun(command(name, '-j', workers))
                after, seconds = run.seconds_of(_FIRST_UPDATE), draws.uniform(0, training)
                if number % 3 == 2:
                    after = run.seconds_of(_END_OF_TRAINING, draws.randrange(num_epochs))
                    seconds = draws.uniform(0, validation)
                time.sleep(max(0.0, after + seconds - time.monotonic()))
                if run.process.poll() is None:
                    stop(run, single)
                status = run.wait()
                if run.count(_LAST_SCORES) < num_epochs:
                    break
                shutil.rmtree(folder)  # it was over before
            place = place_of(folder)
            num_validations += place.startswith('validation')
            wrong = ['not saved']
            if place != 'nothing saved':
                again = LoggedRun(make_command(args.processes, continuing_words(run.text), with_recipe=False))
                wrong = ['not continued'] if again.wait() else compare(expected, folder)
            good += not wrong
            target = 'launcher' if single is None and args.processes > 1 else f'process {single or 0}'
            verdict = ', '.join(wrong) or 'yes'
            print(f'| {number} | {workers} | {target} | {place} | {status} | {verdict} |', flush=True)
            shutil.rmtree(folder)
    print(f'\n{good} of {args.runs} saved, continued and bit-identical; {num_validations} were stopped in validation.')
    if good != args.runs:
        raise SystemExit(1)


def compare(expected: Dict[str, str], folder: str) -> List[str]:
    """Names of what differs from an unbroken run."""
    found = fingerprint(folder)
    return [name for name in expected if expected[name] != found[name]]


if __name__ == '__main__':
    main()
