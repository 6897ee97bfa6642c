"""The training loop: one epoch of training, one pass of validation"""

import logging
import sys
import time
from typing import Any, Callable, Dict, Optional

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.utils import AverageMeter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .data import num_own_samples, to_device
from .meters import AccuracyMeter, LossMeter

_logger = logging.getLogger(__name__)


def _format_losses(now: Dict[str, float], average: Dict[str, float]) -> str:
    return '  '.join(f'{name.capitalize()}: {now[name]:#.3g} ({average[name]:#.3g})' for name in now)


class Trainer:
    """Trains and validates a task with whatever accelerate was configured for.

    Args:
        task: A timm training task. Its trainable module and the optimizer are prepared here.
        optimizer: Optimizer of the task's trainable module.
        accelerator: Device, processes and precision. Its own gradient accumulation stays at 1.
        scheduler: A timm scheduler, stepped every update here and every epoch by the caller.
        grad_accum_steps: Batches an update.
        clip_gradients: Called with the prepared optimizer before an update.
        mixup_fn: Pixel mixup, where the loader does not do it.
        channels_last: Memory layout of the images.
        log_interval: Updates between log lines.
        recovery_interval: Updates between calls of save_recovery, 0 for never.
        save_recovery: Called with epoch and update in the epoch.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        scheduler: Optional[Any] = None,
        grad_accum_steps: int = 1,
        clip_gradients: Optional[Callable[[torch.optim.Optimizer], None]] = None,
        mixup_fn: Optional[Callable] = None,
        channels_last: bool = False,
        log_interval: int = 50,
        recovery_interval: int = 0,
        save_recovery: Optional[Callable[[int, int], None]] = None,
    ):
        # Only these two are prepared: timm's loaders are no DataLoader, its schedulers count updates themselves.
        task.trainable_module, self.optimizer = accelerator.prepare(task.trainable_module, optimizer)
        self.task = task
        self.accelerator = accelerator
        self.scheduler = scheduler
        self.grad_accum_steps = max(1, grad_accum_steps)
        self.clip_gradients = clip_gradients
        self.mixup_fn = mixup_fn
        self.channels_last = channels_last
        self.log_interval = log_interval
        self.recovery_interval = recovery_interval
        self.save_recovery = save_recovery

    def num_updates(self, loader: Any) -> int:
        """Updates an epoch; the last may accumulate fewer batches."""
        return -(-len(loader) // self.grad_accum_steps)

    def _progress(self, total: int, description: str) -> tqdm:
        hidden = not (self.accelerator.is_main_process and sys.stderr.isatty())
        return tqdm(total=total, desc=description, disable=hidden, leave=False, dynamic_ncols=True)

    def _step(self, input: torch.Tensor, target: torch.Tensor, num_accum: int, need_update: bool) -> Dict:
        """Forward and backward of one batch, and the update if it is due."""
        if need_update:
            result = self.task(input, target)
            self.accelerator.backward(result['loss'] / num_accum)
            if self.clip_gradients is not None:
                self.clip_gradients(self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            with self.task.no_sync():
                result = self.task(input, target)
                self.accelerator.backward(result['loss'] / num_accum)
        return result

    def train_one_epoch(self, epoch: int, loader: Any) -> Dict[str, float]:
        """Train on every batch of loader once.

        Returns:
            Mean losses by name over all processes, in nats.

        Raises:
            ValueError: A loss is not finite.
        """
        self.task.get_trainable_module().train()
        meter = LossMeter(self.accelerator)
        accum, num_updates = self.grad_accum_steps, self.num_updates(loader)
        # reading a value is free on one CPU process; elsewhere it waits for the device, or for the others
        check_always = self.accelerator.device.type == 'cpu' and self.accelerator.num_processes == 1
        update_time, data_time, num_images = AverageMeter(), AverageMeter(), 0
        update_start = data_start = time.perf_counter()
        with self._progress(num_updates, f'Train {epoch}') as bar, logging_redirect_tqdm():
            for batch_idx, batch in enumerate(loader):
                update = batch_idx // accum
                num_accum = min(accum, len(loader) - update * accum)
                need_update = (batch_idx + 1) % accum == 0 or batch_idx + 1 == len(loader)
                input, target = to_device(batch, self.accelerator.device, self.channels_last)
                if self.mixup_fn is not None:
                    input, target = self.mixup_fn(input, target)
                data_time.update(num_accum * (time.perf_counter() - data_start))
                result = self._step(input, target, num_accum, need_update)
                num_images += len(target) * self.accelerator.num_processes
                num_done = epoch * num_updates + update + 1
                meter.update(result, num_done)
                if not need_update:
                    data_start = time.perf_counter()
                    continue

                self.task.update_ema(step=num_done)
                due = update % self.log_interval == 0 or update + 1 == num_updates
                if due or check_always:
                    meter.check()
                update_time.update(time.perf_counter() - update_start)
                if due:
                    lrs = [group['lr'] for group in self.optimizer.param_groups]
                    _logger.info(
                        f'Train: {epoch} [{update:>4d}/{num_updates} ({100.0 * (update + 1) / num_updates:>3.0f}%)]  '
                        f'{_format_losses(meter.now(), meter.average())}  '
                        f'Time: {update_time.val:.3f}s, {num_images / update_time.val:>7.2f}/s  '
                        f'({update_time.avg:.3f}s, {num_images / update_time.avg:>7.2f}/s)  '
                        f'LR: {sum(lrs) / len(lrs):.3e}  '
                        f'Data: {data_time.val:.3f} ({data_time.avg:.3f})'
                    )
                if self.recovery_interval and (update + 1) % self.recovery_interval == 0:
                    self.save_recovery(epoch, update)
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=num_done)
                bar.update()
                num_images, update_start = 0, time.perf_counter()
                data_start = update_start
        if hasattr(self.optimizer, 'sync_lookahead'):
            self.optimizer.sync_lookahead()
        return meter.average()

    @torch.inference_mode()
    def validate(self, loader: Any, ema: bool = False) -> Dict[str, float]:
        """Loss in nats, top-1 and top-5 accuracy in percent, over all processes.

        Args:
            loader: Images and class indices.
            ema: Validate the moving average of the weights.
        """
        model = self.task.get_eval_model(ema=ema)
        model.eval()
        meter = AccuracyMeter(self.accelerator, num_own_samples(loader, self.accelerator))
        name, start = 'Test (EMA)' if ema else 'Test', time.perf_counter()
        with self._progress(len(loader), name) as bar:
            for batch in loader:
                input, target = to_device(batch, self.accelerator.device, self.channels_last)
                with self.accelerator.autocast():
                    output = model(input)
                meter.update(output[0] if isinstance(output, (tuple, list)) else output, target)
                bar.update()
        metrics = meter.compute()
        _logger.info(
            f'{name}: [{len(loader):>4d}/{len(loader)}]  Time: {time.perf_counter() - start:.3f}s  '
            f'Loss: {metrics["loss"]:>7.3f}  Acc@1: {metrics["top1"]:>7.3f}  Acc@5: {metrics["top5"]:>7.3f}'
        )
        return metrics
