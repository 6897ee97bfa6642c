"""What a run continues from, beside weights and optimizer"""

import argparse
import logging
import os
from typing import Any, Dict, Optional, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import unwrap_model

from ..loop import Trainer
from .folder import find_newest_state, progress_of, read_state

_logger = logging.getLogger(__name__)


class RunState:
    """What a state holds beside weights, optimizer and task.

    timm's saver and its resume take along one more object that has a state; they mean a loss scaler. Random generators
    are not among it: all draws follow from the seed and the place in the run, but those of the task, which keeps its
    own.

    Args:
        accelerator: Its loss scaler is part of the state.
    """

    state_dict_key = 'run_state'

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.values: Dict[str, Any] = {}
        self.best: Tuple[Optional[float], Optional[int]] = (None, None)

    def collect(self, trainer: Trainer, epoch: int, batch: int, metric: Optional[float]) -> None:
        """Take the values of a moment. All processes must call this together.

        Args:
            trainer: What trains.
            epoch: Epoch to continue with.
            batch: Batch of it to continue with.
            metric: Metric of the epoch that ended, if one did.
        """
        own = dict(meter=trainer.meter.state_dict(), buffers={})
        if self.accelerator.num_processes > 1:
            own['buffers'] = {k: v.detach().cpu() for k, v in _own_buffers(trainer.task).items()}
        plateau = getattr(trainer.scheduler, 'lr_scheduler', None)
        self.values = dict(
            epoch=epoch,
            batch=batch,
            metric=metric,
            best=list(trainer.best),
            lrs=[group['lr'] for group in trainer.optimizer.param_groups],
            plateau=None if plateau is None else dict(
                state=plateau.state_dict(), restore_lr=trainer.scheduler.restore_lr
            ),
            processes=gather_object([own]),
        )  # fmt: skip

    def state_dict(self) -> Dict[str, Any]:
        scaler = self.accelerator.scaler
        return {**self.values, 'scaler': None if scaler is None else scaler.state_dict()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.values = state
        if self.accelerator.scaler is not None and state['scaler'] is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])

    def restore(self, trainer: Trainer) -> None:
        """Put the values back once everything is set up."""
        trainer.best = self.best
        values = self.values
        if not values:
            return
        processes = values['processes']
        if len(processes) == self.accelerator.num_processes:
            own = processes[self.accelerator.process_index]
            buffers = _own_buffers(trainer.task)
            for name, value in own['buffers'].items():
                buffers[name].copy_(value)
        else:
            own = processes[0]
            _logger.warning(
                f'The state is of {len(processes)} process(es), there are {self.accelerator.num_processes}: the run '
                'goes on, but not to the same weights.'
            )
        if values['batch']:
            trainer.meter.load_state_dict(own['meter'])
        if values['plateau'] is not None and hasattr(trainer.scheduler, 'lr_scheduler'):
            trainer.scheduler.lr_scheduler.load_state_dict(values['plateau']['state'])
            trainer.scheduler.restore_lr = values['plateau']['restore_lr']
            for group, lr in zip(trainer.optimizer.param_groups, values['lrs'], strict=True):
                group['lr'] = lr
            if not values['batch']:
                trainer.scheduler.step(values['epoch'], values['metric'])


def _own_buffers(task: TrainingTask) -> Dict[str, torch.Tensor]:
    """Buffers that processes do not share: those of the model and of its moving average."""
    buffers = {}
    for ema in (False, True):
        module = task.get_trainable_module(ema=ema)
        if module is not None:
            named = unwrap_model(module).named_buffers()
            buffers.update({f'{"ema" if ema else "model"}.{name}': buffer for name, buffer in named})
    return buffers


def resolve_resume(args: argparse.Namespace, accelerator: Accelerator, folder: str) -> Optional[str]:
    """Path of the state that --resume names, the same on all processes; None to start anew.

    Raises:
        ValueError: There is no such state, or it is damaged.
    """
    if not args.resume:
        return None
    if args.resume != 'auto':
        if not os.path.isfile(args.resume):
            raise ValueError(
                f'Expected a checkpoint of train.py in --resume {args.resume!r}, found none. Check the path.'
            )
        read_state(args.resume)
        return args.resume
    found = [find_newest_state(folder) if accelerator.is_main_process else None]
    found = [path for path in gather_object(found) if path is not None]
    if not found:
        _logger.info(f'--resume auto: no state in {folder!r}, starting anew.')
        return None
    return found[0]


def _report_changes(saved: argparse.Namespace, args: argparse.Namespace) -> None:
    ignored = {'resume', 'output', 'experiment', 'start_epoch', 'config', 'eval_only', 'local_rank', 'data'}
    before, now = vars(saved), vars(args)
    changes = [f'{k} {before[k]} -> {now[k]}' for k in sorted(before.keys() & now.keys()) if before[k] != now[k]]
    changes = [change for change in changes if change.split(' ')[0] not in ignored]
    if changes:
        _logger.warning(f'Continuing with other arguments than those of the state: {", ".join(changes)}.')


def resume(
    args: argparse.Namespace,
    path: Optional[str],
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    run_state: RunState,
) -> None:
    """Load a state into task and optimizer, and what else there is into run_state.

    Learning rates and weight decay stay those of the arguments.
    """
    if path is None:
        return
    kept = [
        {k: group[k] for k in ('lr', 'initial_lr', 'lr_scale', 'weight_decay') if k in group}
        for group in optimizer.param_groups
    ]
    with_optimizer = not args.no_resume_opt
    resume_task_checkpoint(
        task,
        path,
        optimizer=optimizer if with_optimizer else None,
        loss_scaler=run_state if with_optimizer else None,
    )
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
    state = read_state(path)
    epoch, batch = progress_of(state)
    run_state.best = tuple(state.get('run_state', {}).get('best', (None, None)))
    if not run_state.values:  # of timm's own script, or without its optimizer
        args.start_epoch = epoch if args.start_epoch is None else args.start_epoch
    _logger.info(f'Continuing {path!r} with epoch {epoch}, batch {batch}.')
    if isinstance(state.get('args'), argparse.Namespace):
        _report_changes(state['args'], args)


def setup_ema(args: argparse.Namespace, task: TrainingTask, resumed: Optional[str]) -> None:
    """Start the moving average of the weights, or continue that of a state."""
    if not args.model_ema:
        return
    task.setup_ema(
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device='cpu' if args.model_ema_force_cpu else None,
    )
    if resumed:
        load_task_ema_checkpoint(task, resumed)
