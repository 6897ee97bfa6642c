#!/usr/bin/env python3
"""Is a damaged checkpoint loaded, or refused in one sentence?

    python benchmarks/fuzz_checkpoints.py
    python benchmarks/fuzz_checkpoints.py --cases 500
    python benchmarks/fuzz_checkpoints.py --case 1234

loads the checkpoints of damaged_checkpoints.py, 2,600 with the same seed each time, in processes that are forked for a
thousand cases each. A case is right if it loads finite weights, or raises a ValueError of one line that names the
file and leaves the model as it was. It may take 10 seconds and 1 GB of memory. Prints a Markdown table of the outcomes
by kind and every case that is not right.
"""

import argparse
import collections
import contextlib
import json
import logging
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

os.environ.setdefault('OMP_NUM_THREADS', '1')

import timm
import torch
from damaged_checkpoints import make_case

from timm_coretune import load_checkpoint

CASES = 2_600
SECONDS = 10
MEMORY = 2**30
MOST_CHARACTERS = 2_500  # of a message
LOADED, REFUSED = 'loaded', 'refused'
RIGHT = (LOADED, REFUSED)
_CHUNK = 1_000  # cases of one process


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
        number: Number of the case.
        kind: What the checkpoint is without the damage.
        damage: How it was damaged.
        result: 'loaded', 'refused', or what is wrong.
        seconds: Time of the load.
        memory: Bytes of memory that the load needed beside what the process had.
        detail: The error.
    """

    number: int
    kind: str
    damage: str
    result: str
    seconds: float
    memory: int
    detail: str


class _TooSlowError(BaseException):
    """A load takes longer than it may."""


def _raise_too_slow(signal_number: int, frame: Any) -> None:
    raise _TooSlowError


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, _raise_too_slow)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _peak_memory() -> int:
    """Largest resident memory of this process since the last reset, in bytes. 0 where the system does not tell."""
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM'))) * 1024


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


_MODELS: Dict[str, torch.nn.Module] = {}


def _fresh_model(name: str) -> torch.nn.Module:
    """A model of zeros, built once."""
    if name not in _MODELS:
        _MODELS[name] = timm.create_model(name, num_classes=3)
        _MODELS[name].original_cfg = dict(_MODELS[name].pretrained_cfg)  # type: ignore[assignment]
    model = _MODELS[name]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    model.pretrained_cfg = dict(model.original_cfg)
    return model


def _is_touched(model: Any) -> bool:
    return model.pretrained_cfg != model.original_cfg or any(bool(t.any()) for t in model.state_dict().values())


def _find_fault(model: Any, error: Optional[BaseException], path: str) -> str:
    """What is wrong with a load that ended, or 'loaded' or 'refused'."""
    if os.path.exists('marker'):
        return 'ran a command'
    if error is None:
        finite = all(bool(torch.isfinite(t).all()) for t in model.state_dict().values() if t.is_floating_point())
        mean, std = model.pretrained_cfg['mean'], model.pretrained_cfg['std']
        numbers = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and all(s > 0 for s in std)
        return LOADED if finite and numbers else 'loaded, but not finite' if numbers else 'bad mean or std'
    if isinstance(error, _TooSlowError):
        return 'too slow'
    text = str(error)
    if _is_touched(model):
        return 'model touched'
    if not isinstance(error, ValueError):
        return 'raw exception'
    if 'MemoryError' in text or 'allocate' in text:
        return 'too much memory'
    if os.path.basename(path) not in text and os.path.basename(os.path.dirname(path)) not in text:
        return 'file not named'
    return REFUSED if len(text) <= MOST_CHARACTERS and text.isprintable() else 'no sentence'


def run_case(number: int, folder: Path) -> Outcome:
    """Load one damaged checkpoint.

    Args:
        number: Number of the case.
        folder: An empty folder, which becomes the working directory.
    """
    os.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        case = make_case(number, folder)
        model = _fresh_model(case.model)
        _reset_peak_memory()
        before = _peak_memory()
        start = time.perf_counter()
        error: Optional[BaseException] = None
        try:
            with _time_limit(SECONDS):
                load_checkpoint(model, case.path, **case.options)
        except (Exception, _TooSlowError) as e:
            error = e
    seconds, memory = time.perf_counter() - start, _peak_memory() - before
    result = _find_fault(model, error, case.path)
    if result in RIGHT and memory > MEMORY:
        result = 'too much memory'
    detail = '' if error is None else f'{type(error).__name__}: {str(error)[:600]!r}'
    return Outcome(number, case.kind, case.damage, result, seconds, memory, detail)


def _work(numbers: Sequence[int], output: int) -> None:
    """Run cases in a forked process, and write one line for each."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
    with os.fdopen(output, 'w', buffering=1) as lines:
        for number in numbers:
            folder = Path(tempfile.mkdtemp())
            try:
                outcome = run_case(number, folder)
            finally:
                os.chdir('/')
                shutil.rmtree(folder, ignore_errors=True)
            lines.write(json.dumps(outcome) + '\n')


def run_cases(numbers: Sequence[int]) -> List[Outcome]:
    """Load damaged checkpoints in forked processes. A process that dies or hangs costs one case only."""
    left = list(numbers)
    outcomes: List[Outcome] = []
    while left:
        chunk = left[:_CHUNK]
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                _work(chunk, writer)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writer)
        found = _collect(reader, len(chunk))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcomes += found
        if len(found) < len(chunk):
            dead = chunk[len(found)]
            outcomes.append(Outcome(dead, '?', '?', 'process died or hung', 0.0, 0, ''))
            chunk = chunk[: len(found) + 1]
        left = left[len(chunk) :]
    return outcomes


def _collect(reader: int, count: int) -> List[Outcome]:
    """Read outcomes until all are there, or none came for too long."""
    found: List[Outcome] = []
    rest = b''
    with os.fdopen(reader, 'rb', buffering=0) as pipe:
        while len(found) < count and select.select([pipe], [], [], 3 * SECONDS)[0]:
            piece = pipe.read(2**16)
            if not piece:
                break
            *lines, rest = (rest + piece).split(b'\n')
            found += [Outcome(*json.loads(line)) for line in lines]
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """Outcomes by kind, as Markdown."""
    results = [*RIGHT, *sorted({o.result for o in outcomes} - set(RIGHT))]
    lines = [
        f'| kind | cases | {" | ".join(results)} | longest, s | most memory, MB |',
        '|' + '---|' * (len(results) + 4),
    ]
    kinds = sorted({o.kind for o in outcomes})
    for kind in (*kinds, 'all'):
        chosen = [o for o in outcomes if kind in (o.kind, 'all')]
        counts = collections.Counter(o.result for o in chosen)
        cells = ' | '.join(str(counts[result]) for result in results)
        most = max(o.memory for o in chosen) / 2**20
        lines.append(f'| {kind} | {len(chosen)} | {cells} | {max(o.seconds for o in chosen):.1f} | {most:.0f} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', type=int, default=CASES, metavar='N', help='number of checkpoints')
    parser.add_argument('--first', type=int, default=0, metavar='N', help='number of the first one')
    parser.add_argument('--case', type=int, metavar='N', help='run this one in this process, and show its error')
    args = parser.parse_args()
    if args.case is not None:
        print(run_case(args.case, Path(tempfile.mkdtemp())))
        return
    start = time.perf_counter()
    outcomes = run_cases(range(args.first, args.first + args.cases))
    print(table(outcomes))
    for outcome in outcomes:
        if outcome.result not in RIGHT:
            print(f'case {outcome.number}, {outcome.kind}, {outcome.damage}: {outcome.result}. {outcome.detail}')
    print(f'{time.perf_counter() - start:.0f} s')
    sys.exit(any(outcome.result not in RIGHT for outcome in outcomes))


if __name__ == '__main__':
    main()
