#!/usr/bin/env python3
"""Does a run that is killed at any of its file events end as one that is not?

    python benchmarks/kill_points.py
    python benchmarks/kill_points.py --points 40

trains two epochs on a few images, with states within the epochs, a moving average and all metrics, and notes every
file event in the run folder: a file is opened for writing, flushed, renamed, linked or removed. Then the run starts
again for each point: it kills itself (SIGKILL) right before or right after the event, or with half of a state written,
and is continued by --resume auto. Weights, moving average, best weights, tables, summary and the names of all files are
compared with the unbroken run, bit by bit. Prints one Markdown table by kind of event.
"""

import argparse
import builtins
import collections
import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

os.environ['OMP_NUM_THREADS'] = '1'  # the order of sums depends on it

import torch
from kill_resume import fingerprint
from PIL import Image

from timm_coretune.train import main as train

_RECIPE = (
    *('--coretune', '--model', 'test_resnet', '--img-size', '32', '-b', '2', '--epochs', '2', '--workers', '0'),
    *('--warmup-epochs', '0', '--lr', '0.01', '--model-ema', '--model-ema-decay', '0.5', '--recovery-interval', '1'),
    *('--metrics', 'confusion,per-class,ece', '--eval-metric', 'loss', '--checkpoint-hist', '1', '--device', 'cpu'),
    *('--log-interval', '1000', '--resume', 'auto'),
)
# what a run imports when it needs it; imported once, before the forks
_IMPORTED_LATE = ('torchmetrics', 'matplotlib.figure', 'matplotlib.backends.backend_agg')
_TABLES = ('confusion.csv', 'per_class.csv')
# before and after the event; a state is also cut in the middle, as its writer knows no smaller steps
_MOMENTS = ('before', 'after')


class Point(NamedTuple):
    """A moment at which a run kills itself.

    Attributes:
        event: Index of the file event.
        kind: Kind of the event.
        moment: before, half or after.
    """

    event: int
    kind: str
    moment: str


class Watch:
    """Wraps the functions that change files in a folder, and kills this process at a point.

    Args:
        folder: The folder.
        event: Index of the event to be killed at, -1 for none.
        moment: before, half or after the event.
    """

    def __init__(self, folder: str, event: int = -1, moment: str = 'before'):
        self.folder = os.path.realpath(folder) + os.sep
        self.event = event
        self.moment = moment
        self.events: List[Tuple[str, str]] = []

    def _is_inside(self, path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f'/proc/self/fd/{path}')
        return isinstance(path, (str, os.PathLike)) and f'{os.path.realpath(path)}{os.sep}'.startswith(self.folder)

    def _die_if(self, number: int, moment: str) -> None:
        if (number, moment) == (self.event, self.moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def _wrap(self, holder: Any, name: str, kind: str, concerns: Callable[..., Any]) -> None:
        original = getattr(holder, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            path = concerns(*args, **kwargs)
            if path is None or not self._is_inside(path):
                return original(*args, **kwargs)
            number = len(self.events)
            self.events.append((kind, os.path.basename(str(path))))
            self._die_if(number, 'before')
            if kind == 'state' and (number, 'half') == (self.event, self.moment):
                content = io.BytesIO()
                original(args[0], content)
                with self.open(path, 'wb') as f:
                    f.write(content.getvalue()[: len(content.getvalue()) // 2])
                self._die_if(number, 'half')
            result = original(*args, **kwargs)
            self._die_if(number, 'after')
            return result

        setattr(holder, name, watched)

    def start(self) -> None:
        """Wrap the functions, for the rest of this process."""
        self.open = builtins.open

        def opened(path: Any, mode: str = 'r', *args: Any, **kwargs: Any) -> Any:
            return path if set(mode) & set('wax+') else None

        def opened_low(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            return path if flags & (os.O_WRONLY | os.O_RDWR) else None

        self._wrap(torch, 'save', 'state', lambda content, path, *args, **kwargs: path)
        self._wrap(builtins, 'open', 'open', opened)
        self._wrap(os, 'open', 'open', opened_low)
        self._wrap(os, 'fsync', 'fsync', lambda descriptor: descriptor)
        self._wrap(os, 'replace', 'rename', lambda source, target: target)
        self._wrap(os, 'link', 'link', lambda source, target: target)
        for name in ('unlink', 'remove'):
            self._wrap(os, name, 'unlink', lambda path, **kwargs: path if os.path.lexists(path) else None)


def run_apart(work: Callable[[], Any], log: str) -> int:
    """Run a function in a fork of this process, which has imported everything. Returns the status of os.wait."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    code = 1
    try:
        with open(log, 'w') as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def write_images(folder: str) -> None:
    """Write a data set of two classes: 12 training and 4 validation images."""
    draws = torch.Generator().manual_seed(0)
    for split, count in (('train', 6), ('validation', 2)):
        for label, name in enumerate(('dark', 'light')):
            os.makedirs(os.path.join(folder, split, name))
            for number in range(count):
                pixels = torch.randint(60 * label, 190 + 60 * label, (32, 32, 3), generator=draws, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(os.path.join(folder, split, name, f'{number}.png'))


def outcome(folder: str) -> Dict[str, Any]:
    """What must be the same."""
    result: Dict[str, Any] = dict(fingerprint(folder))
    for name in _TABLES:
        with open(os.path.join(folder, name), 'rb') as f:
            result[name] = f.read()
    with torch.serialization.safe_globals([argparse.Namespace]):
        best = torch.load(os.path.join(folder, 'model_best.pth.tar'), map_location='cpu', weights_only=True)
    result['model_best.pth.tar'] = best['epoch'], {k: v.tolist() for k, v in best['state_dict_ema'].items()}
    result['files'] = sorted(os.listdir(folder))
    return result


def spread(points: List[Point], count: int) -> List[Point]:
    """That many of the points, evenly over the events of each kind, and at least one of each kind."""
    by_kind: Dict[Tuple[str, str], List[Point]] = collections.defaultdict(list)
    for point in points:
        by_kind[point.kind, point.moment].append(point)
    in_order = [point for kind in sorted(by_kind) for point in by_kind[kind]]
    count = min(count, len(in_order))
    chosen = [in_order[(2 * i + 1) * len(in_order) // (2 * count)] for i in range(count)]
    missing = {point.kind for point in points} - {point.kind for point in chosen}
    middles = [[point for point in points if point.kind == kind] for kind in sorted(missing)]
    return [*chosen, *(of_kind[len(of_kind) // 2] for of_kind in middles)]


def differences(expected: Dict[str, Any], folder: str) -> List[str]:
    """Names of what differs from the unbroken run."""
    try:
        found = outcome(folder)
    except OSError as e:
        return [str(e)]
    return [name for name in expected if expected[name] != found[name]]


@contextlib.contextmanager
def _scratch(kept: str) -> Iterator[str]:
    if kept:
        os.makedirs(kept, exist_ok=True)
        yield kept
    else:
        memory = '/dev/shm' if os.path.isdir('/dev/shm') else None  # faster, and a kill loses nothing of a file system
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--points', type=int, default=300, metavar='N', help='points to be killed at (default: 300)')
    parser.add_argument('--keep', default='', metavar='DIR', help='folder in which runs and logs are kept')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for module in _IMPORTED_LATE:
        importlib.import_module(module)
    with _scratch(args.keep) as output:
        images, log, noted = (os.path.join(output, name) for name in ('images', 'log.txt', 'events.json'))
        write_images(images)

        def run(name: str, watch: Watch) -> None:
            watch.start()
            train(['--data-dir', images, '--output', output, '--experiment', name, *_RECIPE])

        def run_and_note() -> None:
            watch = Watch(os.path.join(output, 'unbroken'))
            run('unbroken', watch)
            with open(noted, 'w') as f:
                json.dump(watch.events, f)

        started = time.monotonic()
        if run_apart(run_and_note, log):
            with open(log) as f:
                raise SystemExit(f'The unbroken run failed:\n{f.read()}')
        seconds = time.monotonic() - started
        expected = outcome(os.path.join(output, 'unbroken'))
        with open(noted) as f:
            events = json.load(f)
        points = []
        for number, (kind, _) in enumerate(events):
            moments = ('before', 'half', 'after') if kind == 'state' else _MOMENTS
            points += [Point(number, kind, moment) for moment in moments]
        chosen = spread(points, args.points)
        tried: Dict[str, int] = collections.Counter()
        same: Dict[str, int] = collections.Counter()
        started = time.monotonic()
        for index, point in enumerate(chosen):
            name, log = f'run-{index}', os.path.join(output, f'log-{index}.txt')
            folder = os.path.join(output, name)
            watch = Watch(folder, point.event, point.moment)
            ended = run_apart(lambda name=name, watch=watch: run(name, watch), log)
            if not os.WIFSIGNALED(ended):
                raise SystemExit(f'The run was not killed at {point}, see {log} (with --keep).')
            ended = run_apart(lambda name=name, folder=folder: run(name, Watch(folder)), log)
            wrong = ['the run that goes on fails'] if ended else differences(expected, folder)
            tried[point.kind] += 1
            same[point.kind] += not wrong
            if not args.keep:
                shutil.rmtree(folder)
            if wrong:
                where = f'{point.moment} {point.kind} of {events[point.event][1]} (event {point.event})'
                print(f'Killed {where}: other {", ".join(wrong)}', file=sys.stderr, flush=True)
        names = dict(state='a state is written', open='a file is opened for writing', fsync='a file is flushed')
        names.update(rename='a file is renamed', link='a file is linked', unlink='a file is removed')
        print('| event | in the run | points | same as unbroken |')
        print('|---|---|---|---|')
        count = collections.Counter(kind for kind, _ in events)
        for kind in names:
            print(f'| {names[kind]} | {count[kind]} | {tried[kind]} | {same[kind]} |')
        print(f'| total | {len(events)} | {len(chosen)} | {sum(same.values())} |')
        each = (time.monotonic() - started) / len(chosen)
        print(f'\nAn unbroken run takes {seconds:.1f} s, a point {each:.1f} s; there are {len(points)} points in all.')
    if sum(same.values()) != len(chosen):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
