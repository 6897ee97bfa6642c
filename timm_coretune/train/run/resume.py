"""Continues a run: loads the training state that --resume names into task and optimizer"""

import dataclasses
import logging
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.models import clean_state_dict
from timm.task import TrainingTask, resume_task_checkpoint

from ...checkpoint.download import download
from ...redaction import REDACTED, redact_values
from ...run_folder import describe_weights
from ..cli.settings import OutputSettings, SavedArguments, Settings
from .folder import find_newest_state, folder_of, progress_of, read_state

_logger = logging.getLogger(__name__)

# settings that may differ without a warning when a run is continued
_MAY_DIFFER = {
    *('resume', 'output', 'experiment', 'start_epoch', 'config', 'eval_only', 'local_rank', 'data', 'preset'),
    *('stop_epoch', 'save_epochs', 'time_limit'),
}

ROWS_KEY = 'rows'  # where a state keeps the rows of the summary, in what it keeps of the loop
Best = Tuple[Optional[float], Optional[int]]
_GENERATORS = ('generator', '_extra_state')  # states of random generators, which a state may lack
# what the groups of an optimizer keep of this run, whatever the state has
_OF_THE_COMMAND_LINE = ('lr', 'initial_lr', 'lr_scale', 'weight_decay', 'momentum', 'betas', 'eps')


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
        saved_at: Epoch and batch at which the state was saved. They may differ from those to continue with.
        rows: Rows of the summary up to the state. None if the state has none, as those of earlier versions.
        before: Settings of the run that wrote the state, by name.
    """

    path: Optional[str] = None
    epoch: int = 0
    batch: int = 0
    best: Best = (None, None)
    loop_state: Dict[str, Any] = {}
    saved_at: Tuple[int, int] = (0, 0)
    rows: Optional[List[Dict[str, str]]] = None
    before: Mapping[str, Any] = {}


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


def without_lost_checkpoint(settings: Settings, state_path: Optional[str]) -> Settings:
    """Settings that create the model of a run that is continued, without a checkpoint that cannot be downloaded again.

    Such is one by a URL whose secrets were left out when the run was written, if the cache does not have it. The state
    has all weights, and the config beside it says how images are normalized.
    """
    chosen = (settings.model.pretrained_path, settings.model.initial_checkpoint)
    urls = [url for url in chosen if url and REDACTED in url]
    if state_path is None or not urls:
        return settings
    try:
        for url in urls:
            download(url)
    except ValueError as e:
        description = describe_weights(os.path.dirname(os.path.abspath(state_path)))
        if description is None:
            raise
        _logger.warning(f'The weights and the normalization of images are those of {state_path!r} alone. {e}')
        model = dataclasses.replace(settings.model, pretrained_path=None, initial_checkpoint='')
        names = [name for name in ('mean', 'std') if getattr(settings.data, name) is None]
        found: Dict[str, Any] = {name: list(description.data_config[name]) for name in names}
        return dataclasses.replace(settings, model=model, data=dataclasses.replace(settings.data, **found))
    return settings


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> List[str]:
    names = sorted((before.keys() & now.keys()) - _MAY_DIFFER)
    return [f'{name} {before[name]} -> {now[name]}' for name in names if before[name] != now[name]]


def _flatten(state: Mapping[str, Any], prefix: str = '') -> Dict[str, torch.Tensor]:
    tensors: Dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            tensors.update(_flatten(value, f'{prefix}{name}.'))
        elif isinstance(value, torch.Tensor):
            tensors[f'{prefix}{name}'] = value
    return tensors


def _difference(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> List[str]:
    """Say in a list of at most one sentence in what the tensors of a state differ from those of this run."""
    shapes, expected = (
        {k: tuple(v.shape) for k, v in _flatten(state).items() if not k.endswith(_GENERATORS)} for state in (saved, own)
    )
    names = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    if not names:
        return []
    was, now = (f'of shape {found[names[0]]}' if names[0] in found else 'missing' for found in (shapes, expected))
    return [
        f'{what}: {len(names)} of {len({**expected, **shapes})} tensors do not fit, such as {names[0]}, which is {was} '
        f'in the state and {now} here'
    ]


def _obstacles(
    state: Mapping[str, Any],
    task: TrainingTask,
    optimizer: Optional[torch.optim.Optimizer],
    values: Mapping[str, Any],
) -> List[str]:
    """What of a state does not fit this run, in words. Empty if the run can continue."""
    own = task.get_checkpoint_state()
    found = _difference('the weights', clean_state_dict(state['state_dict']), own['state_dict'])
    saved_loss, own_loss = state.get('task_state') or {}, own.get('task_state') or {}
    if saved_loss and own_loss:
        found += _difference('the loss', saved_loss, own_loss)
    if optimizer is None or 'optimizer' not in state:
        return found
    before = getattr(state.get('args'), 'opt', None)
    if before is not None and values.get('opt', before) != before:
        found.append(f'the optimizer: the state is that of {before}, this run has {values["opt"]}')
    else:
        saved, here = (
            [len(group['params']) for group in groups]
            for groups in (state['optimizer']['param_groups'], optimizer.param_groups)
        )
        if saved != here:
            found.append(
                f'the optimizer: the state has {sum(saved)} parameters in {len(saved)} groups, this run {sum(here)} in '
                f'{len(here)}'
            )
    return found


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

    Raises:
        ValueError: The state does not fit this run.
    """
    if path is None:
        return Continuation()
    state = read_state(path)
    before = redact_values(vars(state['args'])) if isinstance(state.get('args'), SavedArguments) else {}
    changes = _changes(before, values)
    if changes:
        _logger.warning(f'Continuing with other arguments than those of the state: {", ".join(changes)}.')
    obstacles = _obstacles(state, task, optimizer if with_optimizer else None, values)
    if obstacles:
        remedy = 'Continue with the arguments of the state, or start a new run from its weights (--initial-checkpoint).'
        if all(obstacle.startswith('the optimizer') for obstacle in obstacles):
            remedy = 'Continue with the arguments of the state, or with a new optimizer (--no-resume-opt).'
        raise ValueError(
            f'Cannot continue {path!r}. Changed arguments: {", ".join(changes) or "none"}. What does not fit is '
            f'{"; ".join(obstacles)}. {remedy}'
        )
    kept: List[Dict[str, Any]] = [
        {k: group[k] for k in _OF_THE_COMMAND_LINE if k in group} for group in optimizer.param_groups
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
    epoch, batch = saved_at = progress_of(state)
    run_state = state.get('run_state', {})
    best = tuple(run_state.get('best', (None, None)))
    batch = batch if loop_state.values else 0
    _logger.info(f'Continuing {path!r} with epoch {epoch}, batch {batch}.')
    return Continuation(
        path, epoch, batch, best, loop_state.values, saved_at, run_state.get(ROWS_KEY), before
    )  # fmt: skip
