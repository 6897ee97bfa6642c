"""What a run leaves on disk: states to continue from, weights to use, a summary

Every file is written beside its place and then renamed, so that whatever stops the run finds the one before intact.
"""

import argparse
import contextlib
import csv
import glob
import logging
import os
import shutil
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, get_state_dict, unwrap_model, update_summary
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..hub.export import save_weights
from ..hub.push import RUN_WEIGHTS_NAME as WEIGHTS_NAME
from .folder import find_newest_state, progress_of, read_state
from .loop import LOWER_IS_BETTER, Trainer

_logger = logging.getLogger(__name__)

LAST_NAME = 'last.pth.tar'
SUMMARY_NAME = 'summary.csv'


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
    run_state.best = tuple(state.get('run_state', {}).get('best', (None, None)))
    if not run_state.values:  # of timm's own script, or without its optimizer
        epoch, _ = progress_of(state)
        args.start_epoch = epoch if args.start_epoch is None else args.start_epoch
    _logger.info(f'Continuing {path!r} with epoch {progress_of(state)[0]}, batch {progress_of(state)[1]}.')
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


class _Saver(CheckpointSaver):
    """timm's, but a file is in its place at every moment; timm removes the old one before it puts the new one there."""

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f'{dst}.tmp'
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            os.link(src, temporary)
        except OSError:
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)

    def restore(self, best: Tuple[Optional[float], Optional[int]], metrics: Dict[int, float]) -> None:
        """Rank the checkpoints that are there, as an uninterrupted run would have.

        Args:
            best: Best metric and its epoch.
            metrics: Metric of every epoch that was validated.
        """
        self.best_metric, self.best_epoch = best
        files = [(self._path(epoch), metric) for epoch, metric in metrics.items()]
        self.checkpoint_files = sorted(
            [(path, metric) for path, metric in files if os.path.exists(path)],
            key=lambda item: item[1],
            reverse=not self.decreasing,
        )[: self.max_history]
        recoveries = sorted(
            (os.path.join(self.recovery_dir, name) for name in os.listdir(self.recovery_dir)), key=os.path.getmtime
        )
        recoveries = [path for path in recoveries if os.path.basename(path).startswith(self.recovery_prefix + '-')]
        self.curr_recovery_file = recoveries[-1] if recoveries else ''

    def _path(self, epoch: int) -> str:
        return os.path.join(self.checkpoint_dir, f'{self.save_prefix}-{epoch}{self.extension}')


class RunRecord:
    """Writes the folder of a run. It exists on all processes, since collecting a state takes all; one writes.

    Args:
        args: Arguments of the run.
        args_text: The same as YAML.
        folder: The folder, on the main process.
        task: What is trained.
        optimizer: Its optimizer.
        run_state: What states hold beside them.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        args_text: str,
        folder: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        run_state: RunState,
    ):
        self.folder = folder
        self.task = task
        self.run_state = run_state
        self.accelerator = run_state.accelerator
        self.eval_metric = args.eval_metric
        self.with_images = args.save_images
        self.publish_ema = args.model_ema and not args.model_ema_force_cpu
        self.last_state: Optional[str] = None
        self.last_row: Optional[Dict[str, float]] = None
        self.saver: Optional[_Saver] = None
        if not self.accelerator.is_main_process:
            return
        self.saver = _Saver(
            model=task.get_eval_model(),
            optimizer=optimizer,
            args=args,
            amp_scaler=run_state,
            checkpoint_dir=folder,
            recovery_dir=folder,
            decreasing=args.eval_metric in LOWER_IS_BETTER,
            max_history=args.checkpoint_hist,
            task=task,
        )
        with self._writing():
            with open(self.path('args.yaml.tmp'), 'w') as f:
                f.write(args_text)
            os.replace(self.path('args.yaml.tmp'), self.path('args.yaml'))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as e:  # torch raises the second when a disk is full
            for name in os.listdir(self.folder):
                if name.endswith('.tmp') or name in ('tmp.pth.tar', 'recovery_tmp.pth.tar'):
                    os.unlink(self.path(name))
            kept = f'The state before is intact: {self.last_state}.' if self.last_state else 'There is no state yet.'
            raise OSError(
                f'Could not write to {self.folder!r}: {e}. {kept} Make room, then continue with --resume auto.'
            ) from e

    def continue_from(self, path: str) -> None:
        """Go on where a state of this folder stopped: rows and ranks of what came later are dropped."""
        self.last_state = path
        if self.saver is None or os.path.abspath(os.path.dirname(path)) != os.path.abspath(self.folder):
            return
        values = self.run_state.values
        epoch = values['epoch'] if values else progress_of(read_state(path))[0]
        rows = read_rows(self.path(SUMMARY_NAME))
        rows = [row for row in rows if int(row['epoch']) < epoch]
        self._write_rows(rows)
        column = f'eval_{self.eval_metric}'
        ranked = {int(row['epoch']): float(row.get(column) or row['train_loss']) for row in rows}
        self.saver.restore(self.run_state.best, ranked)

    def _write_rows(self, rows: List[Dict[str, str]]) -> None:
        path = self.path(SUMMARY_NAME)
        if not rows:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        with open(f'{path}.tmp', 'w', newline='') as f:
            writer = csv.DictWriter(f, fieldnames=rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        os.replace(f'{path}.tmp', path)

    def save_images(self, input: torch.Tensor, batch_idx: int) -> None:
        """Write a batch as a picture, if asked for."""
        if self.with_images and self.saver is not None and isinstance(input, torch.Tensor):
            from torchvision.utils import save_image

            save_image(input, self.path(f'train-batch-{batch_idx}.jpg'), padding=0, normalize=True)

    def save_recovery(self, trainer: Trainer, epoch: int, update: int, next_batch: int) -> None:
        """Save a state in the middle of an epoch."""
        if trainer.is_sharded:
            return
        self.run_state.collect(trainer, epoch, next_batch, metric=None)
        if self.saver is not None:
            with self._writing():
                self.saver.save_recovery(epoch, batch_idx=update)
            self.last_state = self.saver.curr_recovery_file

    def save_epoch(
        self,
        trainer: Trainer,
        epoch: int,
        metric: float,
        is_best: bool,
        train_metrics: Dict[str, float],
        eval_metrics: Optional[Dict[str, float]],
    ) -> None:
        """Add a row to the summary, save the weights if they are the best so far, then a state.

        In this order: a state says that all before it is there, and what comes after an older one is written again.
        """
        weights = self._published_weights(trainer) if is_best else None
        if not trainer.is_sharded:
            self.run_state.collect(trainer, epoch + 1, 0, metric)
        lrs = [group['lr'] for group in trainer.optimizer.param_groups]
        row = {f'train_{k}': v for k, v in train_metrics.items()}
        row.update({f'eval_{k}': v for k, v in (eval_metrics or {}).items()}, lr=sum(lrs) / len(lrs))
        self.last_row = row
        if self.accelerator.trackers:
            self.accelerator.log(row, step=epoch)
        if self.saver is None:
            return
        with self._writing():
            path = self.path(SUMMARY_NAME)
            if os.path.exists(path):
                shutil.copyfile(path, f'{path}.tmp')
            update_summary(
                epoch,
                train_metrics,
                eval_metrics,
                filename=f'{path}.tmp',
                lr=row['lr'],
                write_header=not os.path.exists(path),
            )
            os.replace(f'{path}.tmp', path)
            if weights is not None:
                kind = 'ema' if self.publish_ema else 'model'
                save_weights(weights, self.path(WEIGHTS_NAME), epoch=str(epoch), weights=kind)
                if trainer.metrics is not None:
                    trainer.metrics.write(self.folder)
            if not trainer.is_sharded:
                self.saver.save_checkpoint(epoch, metric=metric)
                self.last_state = self.path(LAST_NAME)

    def finish(self) -> None:
        """Remove the states in the middle of epochs, once the run is over."""
        if self.saver is not None:
            for path in glob.glob(os.path.join(glob.escape(self.folder), 'recovery-*.pth.tar')):
                os.unlink(path)

    def _published_weights(self, trainer: Trainer) -> Dict[str, torch.Tensor]:
        """Weights of the plain timm model, or of its moving average. A sharded model is gathered by all processes."""
        if trainer.is_sharded:
            module = trainer.task.get_trainable_module()
            if trainer.accelerator.is_fsdp2:
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                state_dict = get_model_state_dict(module, options=options)
            else:
                state_dict = trainer.accelerator.get_state_dict(module)
            is_wrapped = hasattr(unwrap_model(module), 'criterion')
            return {
                k.removeprefix('model.'): v for k, v in state_dict.items() if not is_wrapped or k.startswith('model.')
            }  # fmt: skip
        return get_state_dict(trainer.task.get_eval_model(ema=self.publish_ema))


def read_rows(path: str) -> List[Dict[str, str]]:
    """Rows of a summary.csv, none if it is not there."""
    if not os.path.exists(path):
        return []
    with open(path, newline='') as f:
        return list(csv.DictReader(f))
