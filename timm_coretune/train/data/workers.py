"""Lets the processes that load data outlive a signal that stops the run

A launcher, `timeout` and SLURM send a signal to all processes of a run. A process that loads data would end by it, and
torch then stops the training in the middle of an update with an error.
"""

import multiprocessing
import os
import signal
import threading
from typing import Any, Callable, Optional

from ..preemption import SIGNALS


def _wait_for_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:  # torch or Python ends its worker
            os._exit(0)


class OutlivesSignals:
    """The worker_init_fn of a loader whose processes leave SIGTERM and SIGUSR1 to the process that trains.

    SIGTERM from that process itself still ends them.

    Args:
        init_fn: Called in each process too, with its index.
    """

    def __init__(self, init_fn: Optional[Callable[[int], None]] = None):
        self.init_fn = init_fn

    def __call__(self, worker_id: int) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and hasattr(signal, 'sigwaitinfo'):  # macOS and Windows have none
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            threading.Thread(target=_wait_for_parent, args=(parent.pid,), daemon=True).start()
        if self.init_fn is not None:
            self.init_fn(worker_id)


def outliving_signals(loader: Any) -> Any:
    """The loader, whose processes outlive the signals that stop a run. Call this before any of them is started."""
    inner = getattr(loader, 'loader', loader)
    if getattr(inner, 'num_workers', 0):
        inner.worker_init_fn = OutlivesSignals(inner.worker_init_fn)
    return loader
