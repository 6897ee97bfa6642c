"""Writes the run folder: training states to continue from, the best weights and a summary"""

import contextlib
import csv
import glob
import os
import shutil
from typing import Any, Dict, Iterator, List, Optional, Tuple, cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, get_state_dict, unwrap_model, update_summary
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ...atomic import TEMPORARY_SUFFIX, move_into_place, write_text, write_whole
from ...evaluation.scores import SCORES, for_ranking
from ...export import save_weights
from ...run_folder import (
    ARGS_NAME,
    BEST_WEIGHTS_NAME,
    EVAL_PREFIX,
    LAST_STATE_NAME,
    RECOVERY_PATTERN,
    SUMMARY_NAME,
    UNFINISHED_STATE_NAMES,
    read_summary,
)
from ..cli.settings import OutputSettings, SavedArguments
from ..loop import Trainer
from .resume import Continuation, LoopState


class _Saver(CheckpointSaver):
    """timm's saver, but files are replaced in one step. timm's own removes the old file before it moves the new one."""

    def _replace(self, src: str, dst: str) -> None:
        move_into_place(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with write_whole(dst) as temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            try:
                os.link(src, temporary)
            except OSError:
                shutil.copy2(src, temporary)

    def restore(self, best: Tuple[Optional[float], Optional[int]], metrics: Dict[int, float]) -> None:
        """Rank the states in the folder as an uninterrupted run would have ranked them.

        Args:
            best: Best score and its epoch.
            metrics: Score of every validated epoch.
        """
        self.best_metric, self.best_epoch = best
        files = [(self._checkpoint_path(epoch), metric) for epoch, metric in metrics.items()]
        self.checkpoint_files = sorted(
            [(path, metric) for path, metric in files if os.path.exists(path)],
            key=lambda item: item[1],
            reverse=not self.decreasing,
        )[: self.max_history]
        recoveries = glob.glob(os.path.join(glob.escape(self.recovery_dir), RECOVERY_PATTERN))
        self.curr_recovery_file = max(recoveries, key=os.path.getmtime, default='')


class RunRecord:
    """Writes the run folder. All processes have a record, since all take part in collecting a state; one writes.

    Args:
        folder: The run folder. Only the main process needs it.
        task: Task that is trained.
        optimizer: Optimizer of the task.
        accelerator: Processes and trackers.
        settings: How many states are kept, and whether batches are saved as pictures.
        saved: All settings of the run, which are stored in states. The eval_metric in them ranks the epochs.
        publish_ema: Whether the best weights are saved from the moving average, in epochs in which its score counts.
    """

    def __init__(
        self,
        folder: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        settings: OutputSettings,
        saved: SavedArguments,
        publish_ema: bool = False,
    ):
        self.folder = folder
        self.task = task
        self.loop_state = LoopState()
        self.accelerator = accelerator
        self.eval_metric: str = saved.eval_metric
        self.with_images = settings.save_images
        self.publish_ema = publish_ema
        self.notes: Dict[str, str] = {}  # further notes in the header of the best weights
        self.last_state: Optional[str] = None
        self.last_row: Optional[Dict[str, float]] = None
        self.saver: Optional[_Saver] = None
        if accelerator.is_main_process:
            self.saver = _Saver(
                model=task.get_eval_model(),
                optimizer=optimizer,
                args=saved,
                amp_scaler=self.loop_state,
                checkpoint_dir=folder,
                recovery_dir=folder,
                decreasing=not SCORES[self.eval_metric].higher_is_better,
                max_history=settings.checkpoint_hist,
                task=task,
            )

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def write_args(self, text: str) -> None:
        """Write the settings of the run as YAML."""
        if self.saver is not None:
            with self._writing():
                write_text(text, self.path(ARGS_NAME))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as e:  # torch raises RuntimeError when a disk is full
            for name in os.listdir(self.folder):
                if name.endswith(TEMPORARY_SUFFIX) or name in UNFINISHED_STATE_NAMES:
                    os.unlink(self.path(name))
            kept = 'There is no state yet. Make room, then start anew.'
            if self.last_state:
                kept = f'The state before is intact: {self.last_state}. Make room, then continue with --resume auto.'
            raise OSError(f'Could not write to {self.folder!r}: {e}. {kept}') from e

    def continue_from(self, continuation: Continuation) -> None:
        """Continue a state of this folder. Rows and ranks of later epochs are dropped."""
        path = self.last_state = continuation.path
        if path is None or self.saver is None:
            return
        if os.path.abspath(os.path.dirname(path)) != os.path.abspath(self.folder):
            return
        rows = read_summary(self.path(SUMMARY_NAME))
        rows = [row for row in rows if int(row['epoch']) < continuation.epoch]
        self._write_rows(rows)
        column = f'{EVAL_PREFIX}{self.eval_metric}'
        ranked = {
            int(row['epoch']): for_ranking(self.eval_metric, float(row.get(column) or row['train_loss']))
            for row in rows
        }
        score, epoch = continuation.best
        self.saver.restore((None if score is None else for_ranking(self.eval_metric, score), epoch), ranked)

    def _write_rows(self, rows: List[Dict[str, str]]) -> None:
        path = self.path(SUMMARY_NAME)
        if not rows:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        with write_whole(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def save_images(self, input: Any, batch_idx: int) -> None:
        """Save a batch as a picture, with --save-images only."""
        if self.with_images and self.saver is not None and isinstance(input, torch.Tensor):
            from torchvision.utils import save_image

            save_image(input, self.path(f'train-batch-{batch_idx}.jpg'), padding=0, normalize=True)

    def save_recovery(self, trainer: Trainer, epoch: int, update: int) -> None:
        """Save a training state in the middle of an epoch."""
        if trainer.is_sharded:
            return
        self.loop_state.values = trainer.state_dict()
        if self.saver is not None:
            with self._writing():
                self.saver.save_recovery(epoch, batch_idx=update)
            self.last_state = self.saver.curr_recovery_file

    def save_epoch(
        self,
        trainer: Trainer,
        epoch: int,
        is_best: bool,
        train_metrics: Dict[str, float],
        eval_metrics: Optional[Dict[str, float]],
    ) -> None:
        """Add a row to the summary, save the weights if they are the best so far, then a state.

        The state comes last, so all files up to its epoch exist. After a crash, later ones are written again.
        """
        weights = self._published_weights(trainer) if is_best else None
        if not trainer.is_sharded:
            self.loop_state.values = trainer.state_dict()
        lrs = [group['lr'] for group in trainer.optimizer.param_groups]
        row = {f'train_{k}': v for k, v in train_metrics.items()}
        row.update({f'{EVAL_PREFIX}{k}': v for k, v in (eval_metrics or {}).items()}, lr=sum(lrs) / len(lrs))
        self.last_row = row
        if self.accelerator.trackers:
            self.accelerator.log(row, step=epoch)
        if self.saver is None:
            return
        with self._writing():
            path = self.path(SUMMARY_NAME)
            with write_whole(path) as temporary:
                if os.path.exists(path):
                    shutil.copyfile(path, temporary)
                update_summary(
                    epoch,
                    train_metrics,
                    eval_metrics,
                    filename=temporary,
                    lr=row['lr'],
                    write_header=not os.path.exists(path),
                )
            if weights is not None:
                kind = 'ema' if self.publish_ema and trainer.ema_counts else 'model'
                save_weights(weights, self.path(BEST_WEIGHTS_NAME), epoch=str(epoch), weights=kind, **self.notes)
                if eval_metrics is not None:
                    trainer.scored.write(self.folder)
            if not trainer.is_sharded:
                metric = trainer.position.metric
                self.saver.save_checkpoint(
                    epoch, metric=None if metric is None else for_ranking(self.eval_metric, metric)
                )
                self.last_state = self.path(LAST_STATE_NAME)

    def finish(self) -> None:
        """Remove the states saved within epochs. Call this when the run is over."""
        if self.saver is not None:
            for path in glob.glob(os.path.join(glob.escape(self.folder), RECOVERY_PATTERN)):
                os.unlink(path)

    def _published_weights(self, trainer: Trainer) -> Dict[str, torch.Tensor]:
        """Weights of the plain timm model or of its moving average. All processes must call this together."""
        if trainer.is_sharded:
            module = cast(nn.Module, trainer.task.get_trainable_module())
            state_dict: Dict[str, Any]
            if trainer.accelerator.is_fsdp2:
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                state_dict = get_model_state_dict(module, options=options)
            else:
                state_dict = trainer.accelerator.get_state_dict(module)
            is_wrapped = hasattr(unwrap_model(module), 'criterion')
            tensors = cast(Dict[str, torch.Tensor], state_dict)
            return {
                k.removeprefix('model.'): v for k, v in tensors.items() if not is_wrapped or k.startswith('model.')
            }  # fmt: skip
        return get_state_dict(trainer.task.get_eval_model(ema=self.publish_ema and trainer.ema_counts))
