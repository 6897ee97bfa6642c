"""Runs train.py for a study, each run in a process of its own that is forked with all libraries loaded"""

import contextlib
import csv
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Dict, List, NamedTuple

PRELOAD = ['timm_coretune.train.session', 'timm', 'torchmetrics.classification', 'torch.utils.data']
NAME = 'run'
DIVERGED = 'diverged'


class TrainError(RuntimeError):
    """A run ended without a result. The message has the end of its log."""


class Outcome(NamedTuple):
    """What a run gave.

    Attributes:
        columns: Scores of the last epoch and number of epochs, by the columns of the results. Only the outcome if the
            run diverged.
        seconds: Duration.
        cpu_seconds: Time of the processor, which does not grow if other programs run beside.
    """

    columns: Dict[str, str]
    seconds: float
    cpu_seconds: float


def _watch_parent(folder: str) -> None:
    """End this process if the study was killed, since it would go on alone."""
    multiprocessing.parent_process().join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _read_scores(folder: str) -> Dict[str, str]:
    """Scores of the last epoch, by the columns of the results."""
    from timm_coretune.run_folder import EVAL_PREFIX, PER_CLASS_NAME, SUMMARY_NAME, read_summary

    rows = read_summary(os.path.join(folder, SUMMARY_NAME))
    if len(rows) != 1:  # then the table of the classes may be of another epoch
        raise ValueError(f'Expected one validated epoch, got {len(rows)}. Leave out --val-interval and --patience.')
    scores = {k.removeprefix(EVAL_PREFIX): v for k, v in rows[0].items() if k.startswith(EVAL_PREFIX)}
    if 'top1' in scores:
        with open(os.path.join(folder, PER_CLASS_NAME), newline='', encoding='utf-8') as f:
            recalls = [float(row['recall']) for row in csv.DictReader(f) if row['recall']]
        scores['class_mean'] = str(sum(recalls) / len(recalls))
    return {**scores, 'epochs': str(int(rows[0]['epoch']) + 1), 'outcome': 'done'}


def _train(words: List[str], folder: str, num_threads: int) -> None:
    """The process of a run. It leaves its result in a file."""
    # a signal to the group of the study is for the study: this process sees its end and removes its folder
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, args=(folder,), daemon=True).start()
    log = os.open(os.path.join(folder, 'log.txt'), os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # pictures of a run that nobody looks at take as long as an epoch: without matplotlib train.py leaves them out
    sys.modules['matplotlib'] = None  # type: ignore[assignment]
    import torch

    from timm_coretune.train.cli.arguments import parse_args
    from timm_coretune.train.loss_meter import DivergedError
    from timm_coretune.train.session import run

    torch.set_num_threads(num_threads)
    # only the last epoch is validated and saved
    words = [*words, '--output', folder, '--experiment', NAME, '--val-interval', str(2**31)]
    try:
        run(parse_args(words), words)
        result = _read_scores(os.path.join(folder, NAME))
    except DivergedError as e:
        logging.getLogger(__name__).warning(str(e))
        result = {'outcome': DIVERGED}
    with open(os.path.join(folder, 'result.json'), 'w', encoding='utf-8') as f:
        json.dump([result, time.process_time()], f)


def _check(command_lines: List[List[str]], path: str) -> None:
    """The process that parses command lines. It leaves an error, or nothing, for each in a file."""
    from timm_coretune.train.cli.arguments import parse_args

    errors = []
    for words in command_lines:
        message = io.StringIO()
        try:
            with contextlib.redirect_stderr(message):
                parse_args(words)
        except (SystemExit, ValueError) as e:
            message.write(str(e) if isinstance(e, ValueError) else '')
        errors.append((message.getvalue().strip().splitlines() or [''])[-1])
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(errors, f)


class Forge:
    """Starts the processes of runs.

    Args:
        num_threads: Threads of each process.
        log_folder: Folder for the logs of failed runs.
    """

    def __init__(self, num_threads: int, log_folder: str):
        self.num_threads = num_threads
        self.log_folder = log_folder
        os.environ['OMP_NUM_THREADS'] = str(num_threads)
        self.context = multiprocessing.get_context('forkserver')
        self.context.set_forkserver_preload(PRELOAD)

    def check(self, command_lines: List[List[str]]) -> List[str]:
        """What train.py would object to in each command line before it reads data. Empty for nothing."""
        with tempfile.TemporaryDirectory(prefix='study-') as folder:
            path = os.path.join(folder, 'errors.json')
            process = self.context.Process(target=_check, args=(command_lines, path))
            process.start()
            process.join()
            with open(path, encoding='utf-8') as f:
                return json.load(f)

    def train(self, words: List[str], log_name: str) -> Outcome:
        """Train once.

        Raises:
            TrainError: There is no result. The log is kept.
        """
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix='study-', ignore_cleanup_errors=True) as folder:
            process = self.context.Process(target=_train, args=(words, folder, self.num_threads))
            process.start()
            try:
                process.join()
            except BaseException:
                process.kill()
                process.join()
                raise
            path = os.path.join(folder, 'result.json')
            if process.exitcode == 0 and os.path.exists(path):
                with open(path, encoding='utf-8') as f:
                    columns, cpu_seconds = json.load(f)
                return Outcome(columns, time.perf_counter() - start, cpu_seconds)
            raise TrainError(self._keep_log(folder, log_name, f'exit code {process.exitcode}'))

    def _keep_log(self, folder: str, name: str, why: str) -> str:
        log = os.path.join(folder, 'log.txt')
        if not os.path.exists(log):
            return f'{why}, without a log'
        os.makedirs(self.log_folder, exist_ok=True)
        path = os.path.join(self.log_folder, name)
        shutil.copy(log, path)
        with open(path, encoding='utf-8', errors='replace') as f:
            lines = [line.strip() for line in f if line.strip()]
        return f'{why}, {path}: {lines[-1] if lines else "empty"}'
