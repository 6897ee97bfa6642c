"""Stops a run early and in order: when a signal asks for it, or when its time is over"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Dict, Optional, Type

import psutil
import torch
from accelerate import Accelerator

EXIT_STATUS = 143  # what a shell reports of a process that SIGTERM ended
# SIGUSR1 is what SLURM is usually told to send some time before the end; Windows lacks it
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name))
TIME_LIMIT = '--time-limit'
_REASONS = ('', *(s.name for s in SIGNALS), TIME_LIMIT)
_SECONDS_BETWEEN_CHECKS = 1.0  # a check over several processes waits for the device and for the others


class Preempted(SystemExit):
    """The run stops before its end. Without a handler the process ends with status 143 and no traceback.

    Args:
        reason: The name of the signal, or --time-limit.
    """

    def __init__(self, reason: str):
        super().__init__(EXIT_STATUS)
        self.reason = reason


class StopRequest:
    """Notes that a run is asked to stop, and tells the training loop at a place where all processes can.

    As a context manager it catches the signals SIGTERM and SIGUSR1, if in the main thread. Until `start_training` is
    called a signal stops the run at once, as there is nothing to save. From then on it only leaves a note.

    Args:
        time_limit: Minutes after the start of the process at which the run is asked to stop. None for no limit.
    """

    def __init__(self, time_limit: Optional[float] = None):
        self.reason = ''
        self.is_training = False
        self.deadline: Optional[float] = None
        if time_limit is not None:
            seconds_so_far = time.time() - psutil.Process().create_time()
            self.deadline = time.monotonic() + 60 * time_limit - seconds_so_far
        self._pid = os.getpid()
        self._before: Dict[int, Any] = {}
        self.start_phase()

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Handle signals as before. Call this when the run is over too, as there is nothing left to stop in order."""
        for number, handler in self._before.items():
            # None stands for a handler that was not installed from Python, which cannot be brought back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._pid:  # a process that loads data was forked with this handler
            return
        self.reason = self.reason or signal.Signals(number).name
        if not self.is_training:
            raise Preempted(self.reason)

    def start_training(self) -> None:
        """Keep requests for the training loop from now on."""
        self.is_training = True

    def start_phase(self) -> None:
        """Check at the next call: training, validation and the end of an epoch take unlike times for a call."""
        self._num_calls, self._calls_between, self._last_check = 0, 1, time.monotonic()

    def agree(self, accelerator: Accelerator) -> str:
        """Why all processes are to stop here, empty if none is asked to. All must call this together.

        In one process this costs nothing. Several processes gather two numbers about once a second, at calls on which
        they agreed when they gathered them before.
        """
        if not self.reason and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = TIME_LIMIT
        if accelerator.num_processes == 1:
            return self.reason
        self._num_calls += 1
        return '' if self._num_calls < self._calls_between else self._gather_reason(accelerator)

    def raise_if_due(self, accelerator: Accelerator) -> None:
        """Stop here if `agree` says so.

        Raises:
            Preempted: The run is asked to stop.
        """
        reason = self.agree(accelerator)
        if reason:
            raise Preempted(reason)

    def _gather_reason(self, accelerator: Accelerator) -> str:
        seconds = time.monotonic() - self._last_check
        own = torch.tensor([[float(_REASONS.index(self.reason)), seconds]], device=accelerator.device)
        rows = accelerator.gather(own).tolist()
        slowest = max(row[1] for row in rows) / self._num_calls
        # no more than twice as many calls as before: the first ones may be faster than those to come
        fitting = int(_SECONDS_BETWEEN_CHECKS / max(slowest, 1e-6))
        self._calls_between = max(1, min(fitting, 2 * self._calls_between))
        self._num_calls, self._last_check = 0, time.monotonic()
        return _REASONS[max(int(row[0]) for row in rows)]
