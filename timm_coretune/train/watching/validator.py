"""Validates the weights that train, and their moving average, over all processes"""

import copy
import logging
import time
from typing import Any, Dict, Optional, cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.task import TrainingTask

from ...evaluation.classification import ClassificationEvaluator
from ...evaluation.scores import Evaluator, is_better
from ..data.batches import count_shared, num_own_samples, to_device
from ..loop_config import LoopConfig
from ..preemption import StopRequest
from ..processes import is_sharded
from .features import FeatureWatch
from .progress import progress_bar
from .trackers import Pictures

_logger = logging.getLogger(__name__)


class Validator:
    """Validates a task. After a validation, `scored` has its tables, and `ema_counts` is whether the average counts.

    Args:
        task: The task, prepared by accelerate.
        accelerator: Device, processes and precision.
        config: Options of the training loop.
        evaluator: Computes the metrics. When None, loss and accuracy of image classification.
        stop: Is asked after every batch whether to stop early. None never stops.
        watch: Measures features.
        pictures: Shows mistakes in the trackers.
    """

    def __init__(
        self,
        task: TrainingTask,
        accelerator: Accelerator,
        config: LoopConfig,
        evaluator: Optional[Evaluator] = None,
        stop: Optional[StopRequest] = None,
        watch: Optional[FeatureWatch] = None,
        pictures: Optional[Pictures] = None,
    ):
        self.task = task
        self.accelerator = accelerator
        self.config = config
        self.evaluator: Evaluator = evaluator or ClassificationEvaluator(accelerator.device)
        self.stop = stop
        self.watch = watch
        self.pictures = pictures
        self.scored, self.ema_counts = self.evaluator, True

    @property
    def with_ema(self) -> bool:
        return self.task.has_ema() and self.config.validate_ema

    def _model(self, ema: bool) -> nn.Module:
        # a sharded model gathers its weights only in the forward pass of the wrapped module
        sharded = is_sharded(self.accelerator)
        model = self.task.get_trainable_module() if sharded else self.task.get_eval_model(ema=ema)
        return cast(nn.Module, model)

    @torch.no_grad()
    def validate(self, loader: Any, ema: bool = False) -> Dict[str, float]:
        """Compute the loss in nats and the other metrics of the evaluator, over all processes.

        Args:
            loader: Batches of images and class indices.
            ema: Whether to validate the moving average of the weights instead of the weights.

        Raises:
            Preempted: The run is asked to stop.
        """
        model, config = self._model(ema), self.config
        model.eval()
        # a distributed sampler repeats images at the end, so that processes have equally many; those are left out
        num_left = num_own_samples(loader, self.accelerator)
        self.evaluator.reset()
        if self.pictures is not None:
            self.pictures.start_validation()
        name, start = 'Test (EMA)' if ema else 'Test', time.perf_counter()
        num_shared = count_shared(loader, self.accelerator)
        if self.stop is not None:
            self.stop.start_phase()
        with progress_bar(self.accelerator, config, len(loader), name) as bar:
            for batch_idx, batch in enumerate(loader):
                if self.stop is not None and batch_idx < num_shared:
                    self.stop.raise_if_due(self.accelerator)
                input, target = to_device(batch, self.accelerator.device, config.channels_last, config.dtype)
                with self.accelerator.autocast():
                    output = model(input)
                output = output[0] if isinstance(output, (tuple, list)) else output
                if config.tta > 1:
                    output = output.unfold(0, config.tta, config.tta).mean(dim=2)
                    target = target[0 : len(target) : config.tta]
                if num_left is not None:
                    output, target = output[:num_left], target[:num_left]
                    num_left -= len(target)
                target = target if target.is_floating_point() else target.long()
                self.evaluator.update(output.float(), target)
                if self.pictures is not None and config.tta <= 1:
                    self.pictures.update(input, output.float(), target)
                bar.update()
        metrics = self.evaluator.compute()
        _logger.info(
            f'{name}: [{len(loader):>4d}/{len(loader)}]  Time: {time.perf_counter() - start:.3f}s  '
            f'{self.evaluator.describe(metrics)}'
        )
        return metrics

    def evaluate(self, loader: Any) -> Dict[str, float]:
        """Validate the weights, and their moving average if config.validate_ema is set.

        Returns:
            The metrics of the better of both by config.eval_metric, of the average if they are equal.
        """
        metrics, self.scored = self.validate(loader), self.evaluator
        if not self.with_ema:
            return metrics
        scored = copy.deepcopy(self.evaluator)
        worst = self.pictures.worst if self.pictures is not None else []
        ema_metrics, name = self.validate(loader, ema=True), self.config.eval_metric
        self.ema_counts = self.config.ema_publish == 'ema' or not is_better(name, metrics[name], ema_metrics[name])
        if self.ema_counts:
            return ema_metrics
        self.scored = scored
        if self.pictures is not None:
            self.pictures.worst = worst
        _logger.info(f'The weights count, not their moving average: {name} {metrics[name]}, not {ema_metrics[name]}.')
        return metrics

    def measure_features(self, name: str) -> Dict[str, float]:
        """Measure the features of the model whose scores count. There must be a `watch`."""
        assert self.watch is not None
        return self.watch.measure(self._model(self.with_ema and self.ema_counts), name)
