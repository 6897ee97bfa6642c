"""The training loop: epochs of training and validation"""

import contextlib
import logging
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import TrainingTask
from timm.utils import AverageMeter, distribute_bn, unwrap_model
from tqdm.contrib.logging import logging_redirect_tqdm

from ..cached_step import CachedStep
from ..data.seeding import kept_generators, make_key, seed_generators, seed_torch
from ..evaluation.scores import Evaluator, is_better
from ..task import CoreTuningTask
from .cli.errors import DivergedError
from .data.batches import (
    Input,
    batches_from,
    count_batches,
    in_step,
    input_to_device,
    is_resumable,
)
from .freezing import BackboneFreezer
from .loop_config import LoopConfig
from .loss_meter import LossMeter
from .preemption import Preempted, StopRequest
from .processes import check_accumulation, check_second_order, is_sharded
from .watching.diverged import Place, StateBefore
from .watching.features import FeatureWatch
from .watching.progress import progress_bar
from .watching.record import Record
from .watching.trackers import Pictures
from .watching.validator import Validator

_logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """The place at which training continues.

    Attributes:
        epoch: Epoch to continue with.
        batch: Batch of this epoch to continue with.
        metric: Score of the epoch before, None if it was not validated.
        is_trained: Whether all batches of this epoch are trained, so that it continues with its validation.
    """

    epoch: int = 0
    batch: int = 0
    metric: Optional[float] = None
    is_trained: bool = False


def _format_losses(now: Dict[str, float], average: Dict[str, float]) -> str:
    return '  '.join(f'{name.capitalize()}: {now[name]:#.3g} ({average[name]:#.3g})' for name in now)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, 'optimizer', optimizer)


class Trainer:
    """Trains and validates a task, on the devices and processes that accelerate was configured for.

    Args:
        task: A timm training task. Its trainable module and the optimizer are prepared here.
        optimizer: Optimizer of the task's trainable module.
        accelerator: Device, processes and precision. Its gradient accumulation stays at 1, since the loop accumulates.
        scheduler: A timm scheduler, which the loop steps.
        config: Options of the training loop.
        mixup_fn: Pixel mixup, if the loader does not apply it.
        clip_gradients: Called with the prepared optimizer before an update.
        freezer: Freezes the backbone in the first epochs.
        record: Is told what happens, and writes the run folder (`run.record.RunRecord`). All processes need one.
        evaluator: Computes the validation metrics. When None, loss and accuracy of image classification.
        stop: Is asked after every update and validation batch whether to stop early. None never stops.
        watch: Measures features after validations, and before the first epoch.
        pictures: Shows images of the first batch and mistakes of validations in the trackers.

    Raises:
        TypeError: config has several contrast_batches, and the task is not a CoreTuningTask for images.
        ValueError: The optimizer needs second derivatives, and there are several processes or contrast_batches. Or
            FSDP or DeepSpeed shard the weights, and there are several contrast_batches.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        scheduler: Optional[Any] = None,
        config: Optional[LoopConfig] = None,
        mixup_fn: Optional[Any] = None,
        clip_gradients: Optional[Callable[[torch.optim.Optimizer], None]] = None,
        freezer: Optional[BackboneFreezer] = None,
        record: Optional[Record] = None,
        evaluator: Optional[Evaluator] = None,
        stop: Optional[StopRequest] = None,
        watch: Optional[FeatureWatch] = None,
        pictures: Optional[Pictures] = None,
    ):
        check_accumulation(accelerator)
        if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':
            _logger.warning('Mixed precision in float16 needs a GPU: this run computes in float32, on the CPU.')
        self.second_order = getattr(_unwrapped(optimizer), 'is_second_order', False)
        if self.second_order:
            check_second_order(type(_unwrapped(optimizer)).__name__, accelerator)
        # Loaders and scheduler are not prepared: timm's loaders are not all DataLoaders, its schedulers count updates.
        task.trainable_module, self.optimizer = accelerator.prepare(task.trainable_module, optimizer)
        self.task = task
        self.accelerator = accelerator
        self.scheduler: Any = scheduler
        self.config = config or LoopConfig()
        self.is_sharded = is_sharded(accelerator)
        self.cached_step = self._create_cached_step() if self.config.contrast_batches > 1 else None
        self.mixup_fn = mixup_fn
        self.clip_gradients = clip_gradients
        self.freezer = freezer
        self.record = record
        self.stop = stop
        self.watch = watch
        self.pictures = pictures
        self.validator = Validator(task, accelerator, self.config, evaluator, stop, watch, pictures)
        self.meter = LossMeter(accelerator)
        # a check costs nothing in a single CPU process; otherwise it waits for the device or for other processes
        on_cpu = accelerator.device.type == 'cpu' and accelerator.num_processes == 1
        self.checks_always = on_cpu or self.config.catch_diverged
        self.data_share = 0.0  # share of the time of the last epoch in which this process waited for batches
        self.best: Tuple[Optional[float], Optional[int]] = (None, None)
        self.position = Position()
        self.num_done = 0  # updates so far, also those of a run that is continued

    def _create_cached_step(self) -> CachedStep:
        obstacle = 'FSDP or DeepSpeed' if self.is_sharded else type(_unwrapped(self.optimizer)).__name__
        if self.is_sharded or self.second_order:
            raise ValueError(
                f'Expected one batch per contrast (--contrast-batch-size) with {obstacle}, got '
                f'{self.config.contrast_batches}. '
                + ('Use DDP.' if self.is_sharded else 'It differentiates gradients, whose graph is not kept.')
            )
        return CachedStep(cast(CoreTuningTask, self.task), prepare=self._input_to_device)

    def _input_to_device(self, input: Input) -> Input:
        return input_to_device(input, self.accelerator.device, self.config.channels_last, self.config.dtype)

    def _scale(self, loss: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Scale the loss of a batch whose size differs from the reference size or from that of other processes."""
        config = self.config
        if config.loss_scale != 'none':
            ratio = batch_size / config.reference_batch_size
            loss = loss * (ratio**0.5 if config.loss_scale == 'sqrt' else ratio)
        if config.uneven_batches and not getattr(self.task, 'is_global_mean', False):
            size = torch.full((), float(batch_size), device=self.accelerator.device)
            loss = loss * (batch_size / self.accelerator.reduce(size, 'mean'))
        return loss

    def _forward_backward(self, inputs: List[Input], target: torch.Tensor, num_accum: float) -> Dict[str, torch.Tensor]:
        def backward(loss: torch.Tensor) -> None:
            loss = self._scale(loss, len(target)) / num_accum
            self.accelerator.backward(loss, **({'create_graph': True} if self.second_order else {}))

        if self.cached_step is not None:
            return self.cached_step(inputs, target, backward)
        result = self.task(inputs[0], target)
        backward(result['loss'])
        return result

    def _step(
        self, inputs: List[Input], target: torch.Tensor, num_accum: float, need_update: bool, place: Place
    ) -> None:
        """Run the forward and backward pass of batches that are contrasted together, and the update if it is due.

        Raises:
            DivergedError: A loss is not finite, and this was checked. The record has kept the step.
        """
        before, record = None, self.record
        if self.checks_always and record is not None and not self.is_sharded:
            before = StateBefore(unwrap_model(self.task.get_trainable_module()))
        with contextlib.nullcontext() if need_update else self.task.no_sync():
            result = self._forward_backward(inputs, target, num_accum)
        self.meter.update(result, place.update)
        if self.checks_always:
            try:
                self.meter.check()
            except DivergedError as e:
                if before is None or record is None:
                    raise
                kept = record.keep_step(self, before, inputs, target, self.meter.last_losses(), place)
                raise DivergedError(f'{e} {kept}') from None
        if not need_update:
            return
        if self.clip_gradients is not None:
            self.clip_gradients(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        after_update: Any = getattr(self.task, 'after_update', None)
        if after_update is not None:
            after_update()

    def _switch_mixup(self, epoch: int, loader: Any) -> None:
        # a resumable loader switches mixup off by itself
        enabled = not self.config.mixup_off_epoch or epoch < self.config.mixup_off_epoch
        if self.mixup_fn is not None:
            self.mixup_fn.mixup_enabled = enabled
        elif not enabled and getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False

    def train_one_epoch(self, epoch: int, loader: Any, start_batch: int = 0) -> Dict[str, float]:
        """Train for one epoch.

        Args:
            epoch: Index of the epoch.
            loader: Batches of images and targets.
            start_batch: Batch to start at, the first of an update. `load_state_dict` restored the losses before it.

        Returns:
            Losses by name, averaged over the epoch and all processes, in nats.

        Raises:
            DivergedError: A loss is not finite.
            Preempted: The run is asked to stop. The record has saved a state.
        """
        cast(nn.Module, self.task.get_trainable_module()).train()
        self._switch_mixup(epoch, loader)
        if self.freezer is not None:
            self.freezer.after_train_mode()
        if not start_batch:
            self.meter = LossMeter(self.accelerator)
        meter, config, device = self.meter, self.config, self.accelerator.device
        num_batches, per_update = count_batches(loader, self.accelerator), config.batches_per_update
        num_updates = -(-num_batches // per_update)  # the last update may have fewer batches
        self.num_done = epoch * num_updates
        update_time, data_time, num_images = AverageMeter(), AverageMeter(), 0
        update_start = data_start = time.perf_counter()
        batches = in_step(batches_from(loader, epoch, start_batch), loader, self.accelerator)
        start_update = start_batch // per_update
        # a resumable loader draws under keys of its own, and timm's pixel mixup from NumPy's generator
        seed = seed_torch if is_resumable(loader) and self.mixup_fn is None else seed_generators
        inputs: List[Input] = []
        targets: List[torch.Tensor] = []
        self._start_phase()
        bar = progress_bar(self.accelerator, config, num_updates, f'Train {epoch}', start_update)
        with bar, logging_redirect_tqdm():
            for batch_idx, batch in enumerate(batches, start_batch):
                update = batch_idx // per_update
                num_in_update = min(per_update, num_batches - update * per_update)
                need_update = (batch_idx + 1) % per_update == 0 or batch_idx + 1 == num_batches
                # images that are contrasted together wait where the loader has put them
                input, target = batch[0], batch[1].to(device, non_blocking=True)
                if self.cached_step is None or self.mixup_fn is not None:
                    input = self._input_to_device(input)
                seed(make_key(config.seed, self.accelerator.process_index, epoch, batch_idx), device)
                if self.mixup_fn is not None:
                    input, target = self.mixup_fn(input, target)
                inputs.append(input)
                targets.append(target)
                data_time.update(num_in_update * (time.perf_counter() - data_start))
                if len(inputs) < config.contrast_batches and not need_update:
                    data_start = time.perf_counter()
                    continue

                target = target if len(targets) == 1 else torch.cat(targets)
                # each image of an update has the same weight, also where fewer batches are contrasted at its end
                num_done = self.num_done = epoch * num_updates + update + 1
                place = Place(epoch, batch_idx, num_done)
                self._step(inputs, target, num_in_update / len(inputs), need_update, place)
                inputs, targets = [], []
                num_images += len(target) * self.accelerator.num_processes
                if not need_update:
                    data_start = time.perf_counter()
                    continue

                self.task.update_ema(step=num_done)
                if config.synchronize_step and device.type != 'cpu':
                    getattr(torch, device.type).synchronize()
                due = update % config.log_interval == 0 or update + 1 == num_updates
                recovery_due = (
                    config.recovery_interval > 0
                    and (update + 1) % config.recovery_interval == 0
                    and update + 1 < num_updates  # after the last one the state of the epoch is saved
                )
                # after the last update the validation is left, or the end of the epoch
                reason_to_stop = self._reason_to_stop() if update + 1 < num_updates else ''
                if due or recovery_due or reason_to_stop:
                    meter.check()
                update_time.update(time.perf_counter() - update_start)
                if due:
                    lrs = [group['lr'] for group in self.optimizer.param_groups]
                    now = meter.now()
                    _logger.info(
                        f'Train: {epoch} [{update:>4d}/{num_updates} ({100.0 * (update + 1) / num_updates:>3.0f}%)]  '
                        f'{_format_losses(now, meter.average())}  '
                        f'Time: {update_time.val:.3f}s, {num_images / update_time.val:>7.2f}/s  '
                        f'({update_time.avg:.3f}s, {num_images / update_time.avg:>7.2f}/s)  '
                        f'LR: {sum(lrs) / len(lrs):.3e}  '
                        f'Data: {data_time.val:.3f} ({data_time.avg:.3f}), '
                        f'{100 * data_time.avg / update_time.avg:.0f}% of the time'
                    )
                    input = self._input_to_device(input)
                    if self.record is not None:
                        self.record.save_images(input, batch_idx)
                        self.record.log_step({**now, 'lr': sum(lrs) / len(lrs)}, num_done)
                    if self.pictures is not None and num_done == 1:
                        self.pictures.log_batch(input, target[: len(input)], num_done)
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=num_done)
                if recovery_due or reason_to_stop:
                    self._save_within(Position(epoch, batch_idx + 1))
                if reason_to_stop:
                    raise Preempted(reason_to_stop)
                bar.update()
                num_images, update_start = 0, time.perf_counter()
                data_start = update_start
        sync_lookahead: Any = getattr(_unwrapped(self.optimizer), 'sync_lookahead', None)
        if sync_lookahead is not None:
            sync_lookahead()
        self.data_share = data_time.avg / max(update_time.avg, 1e-9)
        meter.check()
        return meter.average()

    def _start_phase(self) -> None:
        if self.stop is not None:
            self.stop.start_phase()

    def _reason_to_stop(self) -> str:
        return '' if self.stop is None else self.stop.agree(self.accelerator)

    def _save_within(self, position: Position) -> None:
        """Save a state within an epoch. All processes must call this together."""
        self.position = position
        if self.record is not None:
            update = -(-position.batch // self.config.batches_per_update) - 1
            self.record.save_recovery(self, position.epoch, update)

    def _distribute_batch_norm(self, with_ema: bool) -> None:
        how, num_processes = self.config.dist_bn, self.accelerator.num_processes
        if num_processes > 1 and how in ('reduce', 'broadcast') and not self.is_sharded:
            for ema in (False, True) if with_ema else (False,):
                distribute_bn(self.task.get_eval_model(ema=ema), num_processes, how == 'reduce')

    def is_out_of_patience(self, epoch: int) -> bool:
        """Whether the scores up to this epoch, the last one with a score, have not got better for too long."""
        best_epoch, patience = self.best[1], self.config.patience
        if not patience or best_epoch is None:
            return False
        return epoch - best_epoch >= patience * self.config.val_interval

    def _start_epoch(self, epoch: int) -> None:
        if self.freezer is not None and self.freezer.start_epoch(epoch):
            _logger.info(f'Epoch {epoch}: {"only the head trains" if self.freezer.frozen else "everything trains"}.')
            if self.accelerator.num_processes > 1:
                # DistributedDataParallel is rebuilt, since it must know which parameters get gradients
                module = self.accelerator.unwrap_model(self.task.trainable_module, keep_fp32_wrapper=False)
                self.task.trainable_module = self.accelerator.prepare_model(module)

    def fit(
        self,
        train_loader: Any,
        validation_loader: Optional[Any],
        epochs: range,
        start_batch: int = 0,
    ) -> List[Dict[str, Any]]:
        """Train, validate and save, epoch by epoch. The generators of Python, NumPy and torch are as before afterwards.

        Args:
            train_loader: Batches of images and targets.
            validation_loader: Batches of images and class indices. When None, the training loss selects the best epoch.
            epochs: Indices of the epochs to train.
            start_batch: Batch of the first epoch to start at.

        Returns:
            A dictionary for each validated epoch: its index 'epoch', and the metrics 'train' and 'validation'.
        """
        with kept_generators(self.accelerator.device):
            return self._fit(train_loader, validation_loader, epochs, start_batch)

    def _fit(
        self, train_loader: Any, validation_loader: Optional[Any], epochs: range, start_batch: int
    ) -> List[Dict[str, Any]]:
        results = []
        config = self.config
        if self.watch is not None and not epochs.start and self.position == Position():
            features = self.validator.measure_features('start')
            if self.record is not None:
                self.record.save_start(features)
        for epoch in epochs:
            self._start_epoch(epoch)
            is_due = (epoch + 1) % config.val_interval == 0 or epoch + 1 in (*config.save_epochs, epochs.stop)
            if start_batch and self.position.is_trained:
                train_metrics = self.meter.average()
                num_batches = count_batches(train_loader, self.accelerator)
                self.num_done = (epoch + 1) * -(-num_batches // config.batches_per_update)
            else:
                train_metrics = self.train_one_epoch(epoch, train_loader, start_batch)
                self._distribute_batch_norm(
                    with_ema=is_due and validation_loader is not None and self.validator.with_ema
                )
            start_batch = 0
            metric = None
            name = 'loss' if validation_loader is None else config.eval_metric
            if is_due:
                eval_metrics = None
                if validation_loader is not None:
                    try:
                        eval_metrics = self.validator.evaluate(validation_loader)
                    except Preempted:
                        num_batches = count_batches(train_loader, self.accelerator)
                        self._save_within(Position(epoch, num_batches, is_trained=True))
                        raise
                metric = train_metrics['loss'] if eval_metrics is None else eval_metrics[config.eval_metric]
                is_best = is_better(name, metric, self.best[0])
                if is_best:
                    self.best = (metric, epoch)
                self.position = Position(epoch + 1, metric=metric)
                results.append({'epoch': epoch, 'train': train_metrics, 'validation': eval_metrics})
                features = {}
                if self.watch is not None and self.watch.is_due(epoch, epochs.stop):
                    features = self.validator.measure_features(f'epoch {epoch}')
                    results[-1]['features'] = features
                if self.record is not None:
                    self.record.save_epoch(self, epoch, is_best, train_metrics, eval_metrics, features)
                if self.pictures is not None and eval_metrics is not None:
                    self.pictures.log_mistakes(self.num_done)
            if self.scheduler is not None:
                self.scheduler.step(epoch + 1, metric)
            if metric is not None and self.is_out_of_patience(epoch):
                _logger.info(f'No better {name} in {config.patience} validations: stopping.')
                break
            if is_due and epoch + 1 < epochs.stop:
                self._start_phase()
                if self.stop is not None:  # the state of the end of the epoch is saved
                    self.stop.raise_if_due(self.accelerator)
        return results

    def _own_buffers(self) -> Dict[str, torch.Tensor]:
        """Buffers that may differ between processes, by name: those of the model and of its moving average."""
        buffers = {}
        for ema in (False, True):
            module = self.task.get_trainable_module(ema=ema)
            if module is not None:
                named = unwrap_model(module).named_buffers()
                buffers.update({f'{"ema" if ema else "model"}.{name}': buffer for name, buffer in named})
        return buffers

    def state_dict(self) -> Dict[str, Any]:
        """What training needs to continue, besides weights, optimizer and task. All processes must call this together.

        Random generators are not included. The draws of the loop depend only on the seed and the place in the run, and
        the task saves its own generator.
        """
        own: Dict[str, Any] = dict(meter=self.meter.state_dict(), buffers={})
        if self.accelerator.num_processes > 1:
            own['buffers'] = {k: v.detach().cpu() for k, v in self._own_buffers().items()}
        plateau = getattr(self.scheduler, 'lr_scheduler', None)
        scaler = self.accelerator.scaler
        return dict(
            **self.position._asdict(),
            best=list(self.best),
            ema_counts=self.validator.ema_counts,
            lrs=[group['lr'] for group in self.optimizer.param_groups],
            plateau=None if self.scheduler is None or plateau is None else dict(
                state=plateau.state_dict(), restore_lr=self.scheduler.restore_lr
            ),
            processes=gather_object([own]),
            scaler=None if scaler is None else scaler.state_dict(),
        )  # fmt: skip

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from what `state_dict` returned. Call this when everything else is set up."""
        self.best = tuple(state['best'])
        is_trained = state.get('is_trained', False)  # states of earlier versions lack it
        self.position = Position(state['epoch'], state['batch'], state['metric'], is_trained)
        if self.accelerator.scaler is not None and state['scaler'] is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        processes = state['processes']
        own = processes[0]
        if len(processes) == self.accelerator.num_processes:
            own = processes[self.accelerator.process_index]
            buffers = self._own_buffers()
            for name, value in own['buffers'].items():
                buffers[name].copy_(value)
        else:
            _logger.warning(
                f'The state is of {len(processes)} process(es), there are {self.accelerator.num_processes}: statistics '
                'of BatchNorm are those of the first, and draws of dropout, pixel mixup and random erasing are others. '
                'With the same global batch all else goes on as before.'
            )
        if state['batch']:
            self.meter.load_state_dict(own['meter'])
        if state['plateau'] is not None and hasattr(self.scheduler, 'lr_scheduler'):
            self.scheduler.lr_scheduler.load_state_dict(state['plateau']['state'])
            self.scheduler.restore_lr = state['plateau']['restore_lr']
            for group, lr in zip(self.optimizer.param_groups, state['lrs'], strict=True):
                group['lr'] = lr
            if not state['batch'] and not state.get('restarted'):  # a state within an epoch has stepped already
                self.scheduler.step(state['epoch'], state['metric'])
