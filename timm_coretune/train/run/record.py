"""Writes the run folder: training states to continue from, the best weights and a summary"""

import contextlib
import csv
import glob
import logging
import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ...atomic import write_text, write_whole
from ...evaluation.scores import SCORES, for_ranking
from ...export import save_weights
from ...lora import plain_state_dict
from ...redaction import join_command
from ...run_folder import (
    ARGS_NAME,
    BEST_WEIGHTS_NAME,
    EVAL_PREFIX,
    LAST_STATE_NAME,
    MILESTONE_PREFIX,
    RECOVERY_PATTERN,
    START_EPOCH,
    STATE_SUFFIX,
    SUMMARY_NAME,
)
from ..cli.settings import OutputSettings, SavedArguments
from ..data.batches import Input
from ..loop import Trainer
from ..watching.diverged import Place, StateBefore, keep_step
from ..watching.record import Record
from .folder import remove_unfinished
from .repair import best_of, intact_rows, repair_best, set_aside_later
from .resume import ROWS_KEY, Best, Continuation, LoopState
from .saver import Saver

_logger = logging.getLogger(__name__)


class RunRecord(Record):
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
        self.sets_aside = settings.resume != 'auto'
        self.save_epochs = settings.save_epochs
        self.rows: List[Dict[str, str]] = []
        self.publish_ema = publish_ema
        self.notes: Dict[str, str] = {}  # further notes in the header of the best weights
        self.facts: Dict[str, Any] = {}  # what a step that diverged is repeated with, beside the settings
        self.last_state: Optional[str] = None
        self.last_row: Optional[Dict[str, float]] = None
        self.saver: Optional[Saver] = None
        if accelerator.is_main_process:
            self.saver = Saver(
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
            remove_unfinished(self.folder)
            kept = 'There is no state yet. Make room, then start anew.'
            if self.last_state:
                kept = f'The state before is intact: {self.last_state}. Make room, then continue with --resume auto.'
            raise OSError(f'Could not write to {self.folder!r}: {e}. {kept}') from e

    def continue_from(self, continuation: Continuation) -> Continuation:
        """Bring the folder to the place at which a state continues. All processes must call this together.

        Rows and ranks of later epochs are dropped. A state of another folder starts a summary of its own. Returns the
        continuation, without the best score if no file holds the best weights any more.
        """
        self.last_state = continuation.path
        if continuation.path is None:
            return continuation
        best = continuation.best if self.saver is None else self._take_over(continuation, self.saver)
        best = tuple(gather_object([best])[0])  # that of the main process
        loop_state = continuation.loop_state
        return continuation._replace(best=best, loop_state={**loop_state, 'best': list(best)} if loop_state else {})

    def _take_over(self, continuation: Continuation, saver: Saver) -> Best:
        path, best = continuation.path, continuation.best
        assert path is not None
        origin = os.path.dirname(os.path.abspath(path))
        is_own = origin == os.path.abspath(self.folder)
        with self._writing():
            if is_own:
                if self.sets_aside:
                    set_aside_later(self.folder, continuation.saved_at, best[1])
                rows = continuation.rows
                if rows is None:
                    rows = intact_rows(self.path(SUMMARY_NAME))
                self.rows = [row for row in rows if int(row['epoch']) < continuation.epoch]
                self._write_rows()
            ranked = self._ranked()
            metric_before = continuation.before.get('eval_metric', self.eval_metric)
            if metric_before != self.eval_metric:
                best = best_of(self.eval_metric, ranked)
                found = 'no epoch has it' if best[1] is None else f'the best is now epoch {best[1]}'
                _logger.warning(f'The best epoch was chosen by {metric_before}, now by {self.eval_metric}: {found}.')
            if is_own:
                epoch, batch = continuation.saved_at
                saver.restore(ranked, path, None if batch else epoch - 1)
                if not batch and not os.path.exists(self._milestone(epoch)):
                    self._keep_milestone(epoch, path, saver)
            if best[1] is not None and not repair_best(
                saver, self.folder, origin, best[1], self.publish_ema, self.notes
            ):
                state = os.path.basename(saver.state_of(best[1]))
                _logger.warning(
                    f'{self.path(BEST_WEIGHTS_NAME)!r} lacks the weights of the best epoch {best[1]}, and there '
                    f'is no intact {state} to take them from: the best is sought anew from epoch {continuation.epoch} '
                    'on.'
                )
                best = None, None
            saver.best_metric, saver.best_epoch = best
            if best[0] is not None:
                saver.best_metric = for_ranking(self.eval_metric, best[0])
        return best

    def _ranked(self) -> Dict[int, float]:
        """The score of every epoch in the summary that has it."""
        column = f'{EVAL_PREFIX}{self.eval_metric}'
        if self.eval_metric == 'loss' and not any(row.get(column) for row in self.rows):
            column = 'train_loss'  # nothing is validated
        scores = {int(row['epoch']): float(row[column]) for row in self.rows if row.get(column)}
        return {epoch: for_ranking(self.eval_metric, score) for epoch, score in scores.items()}

    def _write_rows(self) -> None:
        path = self.path(SUMMARY_NAME)
        if not self.rows:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        # a run that is continued with other --metrics has columns that not all rows fill
        columns = list(dict.fromkeys(name for row in [self.rows[-1], *self.rows] for name in row))
        with write_whole(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, fieldnames=columns, restval='')
            writer.writeheader()
            writer.writerows(self.rows)

    def save_images(self, input: Any, batch_idx: int) -> None:
        """Save a batch as a picture, with --save-images only."""
        if self.with_images and self.saver is not None and isinstance(input, torch.Tensor):
            from torchvision.utils import save_image

            save_image(input, self.path(f'train-batch-{batch_idx}.jpg'), padding=0, normalize=True)

    def save_recovery(self, trainer: Trainer, epoch: int, update: int) -> None:
        """Save a training state in the middle of an epoch."""
        if trainer.is_sharded:
            return
        self.loop_state.values = {**trainer.state_dict(), ROWS_KEY: self.rows}
        if self.saver is not None:
            with self._writing():
                self.saver.save_recovery(epoch, batch_idx=update)
            self.last_state = self.saver.curr_recovery_file

    def save_start(self, features: Dict[str, float]) -> None:
        """Add a row of figures of the untrained model to the summary. It is written with that of the first epoch."""
        self.rows.append({'epoch': str(START_EPOCH), **{k: str(v) for k, v in features.items()}})
        if self.accelerator.trackers:
            self.accelerator.log(features, step=0)

    def log_step(self, values: Dict[str, float], step: int) -> None:
        """Send losses and learning rate of an update to the trackers, under names of their own."""
        if self.accelerator.trackers:
            self.accelerator.log({f'step_{name}': value for name, value in values.items()}, step=step)

    def keep_step(
        self,
        trainer: Trainer,
        before: StateBefore,
        inputs: Sequence[Input],
        target: torch.Tensor,
        losses: Dict[str, float],
        place: Place,
    ) -> str:
        """Keep a step that diverged. All processes must call this together. Returns a sentence about it."""
        module = unwrap_model(trainer.task.get_trainable_module())
        step = (inputs, target, losses, place, trainer.config.seed)
        try:
            keep_step(self.folder, module, before, *step, self.accelerator, self.facts)
        except (OSError, RuntimeError) as e:
            return f'The step could not be kept: {e}.'
        command = join_command(['timm-coretune', 'replay', self.folder])
        return f'The step is kept, and `{command}` repeats it.'

    def save_epoch(
        self,
        trainer: Trainer,
        epoch: int,
        is_best: bool,
        train_metrics: Dict[str, float],
        eval_metrics: Optional[Dict[str, float]],
        features: Optional[Dict[str, float]] = None,
    ) -> None:
        """Save the weights if they are the best so far, then a state, then add a row to the summary.

        The state holds the rows too, so it alone decides whether the epoch is over: after a crash before it the epoch
        is trained again, and after a crash behind it the summary is written from it.
        """
        weights = self._published_weights(trainer) if is_best else None
        lrs = [group['lr'] for group in trainer.optimizer.param_groups]
        row = {f'train_{k}': v for k, v in train_metrics.items()}
        row.update({f'{EVAL_PREFIX}{k}': v for k, v in (eval_metrics or {}).items()}, lr=sum(lrs) / len(lrs))
        row.update(features or {})
        self.last_row = row
        self.rows.append({'epoch': str(epoch), **{k: str(v) for k, v in row.items()}})
        if not trainer.is_sharded:
            self.loop_state.values = {**trainer.state_dict(), ROWS_KEY: self.rows}
        if self.accelerator.trackers:
            # not a column of the summary, which is the same in every run of the same settings
            further = {'epoch': epoch, 'train_data_share': trainer.data_share}
            self.accelerator.log({**row, **further}, step=trainer.num_done)
        if self.saver is None:
            return
        with self._writing():
            if weights is not None:
                kind = 'ema' if self.publish_ema and trainer.validator.ema_counts else 'model'
                save_weights(weights, self.path(BEST_WEIGHTS_NAME), epoch=str(epoch), weights=kind, **self.notes)
                if eval_metrics is not None:
                    trainer.validator.scored.write(self.folder)
            if not trainer.is_sharded:
                metric = trainer.position.metric
                self.saver.save_checkpoint(
                    epoch, metric=None if metric is None else for_ranking(self.eval_metric, metric)
                )
                self.last_state = self.path(LAST_STATE_NAME)
                self._keep_milestone(epoch + 1, self.last_state, self.saver)
            self._write_rows()

    def _milestone(self, num_epochs: int) -> str:
        return self.path(f'{MILESTONE_PREFIX}{num_epochs}{STATE_SUFFIX}')

    def _keep_milestone(self, num_epochs: int, state: str, saver: Saver) -> None:
        """Keep the state at the end of an epoch, if --save-epochs asks for it."""
        if num_epochs in self.save_epochs:
            saver.copy_state(state, self._milestone(num_epochs))

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
        model = trainer.task.get_eval_model(ema=self.publish_ema and trainer.validator.ema_counts)
        return plain_state_dict(unwrap_model(model))
