"""Continues a run: loads the training state that --resume names into task and optimizer"""

import logging
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import TrainingTask, resume_task_checkpoint

from ..cli.settings import OutputSettings, SavedArguments
from .folder import find_newest_state, folder_of, progress_of, read_state

_logger = logging.getLogger(__name__)

# settings that may differ without a warning when a run is continued
_MAY_DIFFER = {
    *('resume', 'output', 'experiment', 'start_epoch', 'config', 'eval_only', 'local_rank', 'data', 'preset'),
}


class LoopState:
    """Carries the state of the training loop into timm's checkpoints and back.

    timm's saver and resume function accept one more object with a state, meant to be a loss scaler. All processes
    collect the state of the loop, then one saves it. In between it is kept here.
    """

    state_dict_key = 'run_state'

    def __init__(self) -> None:
        self.values: Dict[str, Any] = {}

    def state_dict(self) -> Dict[str, Any]:
        return self.values

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.values = state


class Continuation(NamedTuple):
    """The place at which a run continues.

    Attributes:
        path: Path of the training state, None for a new run.
        epoch: Epoch to continue with.
        batch: Batch of the epoch to continue with.
        best: Best score so far and its epoch.
        loop_state: State of the training loop, empty if it is not continued.
    """

    path: Optional[str] = None
    epoch: int = 0
    batch: int = 0
    best: Tuple[Optional[float], Optional[int]] = (None, None)
    loop_state: Dict[str, Any] = {}


def resolve_resume(settings: OutputSettings, accelerator: Accelerator) -> Optional[str]:
    """Path of the training state that --resume names, the same on all processes. None to start a new run.

    Raises:
        ValueError: There is no such state, or it is damaged.
    """
    if not settings.resume:
        return None
    if settings.resume != 'auto':
        if not os.path.isfile(settings.resume):
            raise ValueError(
                f'Expected a checkpoint of train.py in --resume {settings.resume!r}, found none. Check the path.'
            )
        read_state(settings.resume)
        return settings.resume
    folder = folder_of(settings)
    found = [find_newest_state(folder) if accelerator.is_main_process else None]
    found = [path for path in gather_object(found) if path is not None]
    if not found:
        _logger.info(f'--resume auto: no state in {folder!r}, starting anew.')
        return None
    return found[0]


def _report_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = sorted((before.keys() & now.keys()) - _MAY_DIFFER)
    changes = [f'{name} {before[name]} -> {now[name]}' for name in names if before[name] != now[name]]
    if changes:
        _logger.warning(f'Continuing with other arguments than those of the state: {", ".join(changes)}.')


def resume(
    path: Optional[str],
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    with_optimizer: bool,
    values: Mapping[str, Any],
) -> Continuation:
    """Load a training state into task and optimizer. Learning rates and weight decay are not taken from the state.

    Args:
        path: Path of the state, None for a new run.
        task: Task that is trained.
        optimizer: Optimizer of the task.
        with_optimizer: Whether to load the states of the optimizer and of the training loop too.
        values: Settings of this run by name. The log names those that were different in the state.
    """
    if path is None:
        return Continuation()
    kept: List[Dict[str, Any]] = [
        {k: group[k] for k in ('lr', 'initial_lr', 'lr_scale', 'weight_decay') if k in group}
        for group in optimizer.param_groups
    ]
    loop_state = LoopState()
    resume_task_checkpoint(
        task,
        path,
        optimizer=optimizer if with_optimizer else None,
        loss_scaler=loop_state if with_optimizer else None,
    )
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
    state = read_state(path)
    epoch, batch = progress_of(state)
    best = tuple(state.get('run_state', {}).get('best', (None, None)))
    _logger.info(f'Continuing {path!r} with epoch {epoch}, batch {batch}.')
    if isinstance(state.get('args'), SavedArguments):
        _report_changes(vars(state['args']), values)
    return Continuation(path, epoch, batch if loop_state.values else 0, best, loop_state.values)
