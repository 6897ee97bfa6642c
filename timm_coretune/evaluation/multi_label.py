"""Scores of a classifier of images with several labels, over all processes"""

import logging
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.task.evaluator import MultiLabelClassificationEvaluator, _average_precision

from ..atomic import write_whole
from ..distributed import process_index_and_count
from ..run_folder import OUTPUTS_NAME, PER_CLASS_NAME
from .scores import OF_LABEL_SETS, describe
from .tables import complete_names, write_records

_logger = logging.getLogger(__name__)

_VALUES_ON_DEVICE = 2**25  # logits that are kept on the device before they move: 128 MiB, and 32 MiB of targets


class MultiLabelEvaluator(MultiLabelClassificationEvaluator):
    """Computes binary cross-entropy in nats, and mAP, micro, macro and sample F1 in percent, as timm's evaluator does.

    The average precision of a class without images is 0, and a label is predicted from a probability of `threshold`
    on.

    Args:
        device: Device of the outputs.
        threshold: Probability from which a label is predicted, in (0, 1).
        metrics: What is written too: 'per-class' (a table), 'predictions' (logits and targets of all images).
        num_classes: Number of classes of the model.
        class_names: Names of the classes by index. When None their indices.
    """

    def __init__(
        self,
        device: Optional[torch.device] = None,
        threshold: float = 0.5,
        metrics: Sequence[str] = (),
        num_classes: int = 0,
        class_names: Optional[Sequence[str]] = None,
    ):
        self.metrics = tuple(metrics)
        self.class_names = complete_names(class_names, num_classes)
        super().__init__(device, threshold=threshold)

    def reset(self) -> None:
        super().reset()
        self.waiting: List[Tuple[torch.Tensor, torch.Tensor]] = []  # logits and targets that are still on the device
        self.num_waiting = 0
        self.has_soft_targets = torch.zeros((), dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits of any floating dtype and targets, both (batch_size, num_classes).

        timm's evaluator looks at the values of every batch, and copies it to the CPU: both wait for the device. Here
        that is done for many batches at once.
        """
        if output.ndim != 2 or target.shape != output.shape:
            raise ValueError(
                f'Expected logits and targets (batch_size, num_classes), got {tuple(output.shape)} and '
                f'{tuple(target.shape)}.'
            )
        output, target = self._prepare(output, target.float())
        if not output.shape[0]:
            return
        self._accumulate_loss(self.criterion(output, target), output.shape[0])
        self.has_soft_targets |= ((target != 0) & (target != 1)).any()
        self.waiting.append((output, target >= 0.5))
        self.num_waiting += output.numel()
        if self.num_waiting >= _VALUES_ON_DEVICE:
            self._move()

    def _move(self) -> None:
        """Move the logits and targets that wait on the device to the CPU, in their order."""
        if self.waiting:
            outputs, targets = zip(*self.waiting, strict=True)
            self.outputs.append(torch.cat(outputs).cpu())
            self.targets.append(torch.cat(targets).cpu())
        self.waiting, self.num_waiting = [], 0

    def compute(self, distributed: Optional[bool] = None) -> Dict[str, float]:
        """Compute the scores by name over all processes. All processes must call this together."""
        if distributed is None:
            distributed = process_index_and_count()[1] > 1
        self._move()
        if self.has_soft_targets and not self._warned_soft_targets:
            _logger.warning('Targets between 0 and 1 count as labels from 0.5 on in mAP and F1.')
            self._warned_soft_targets = True
        scores = super().compute(distributed)
        if distributed and self.metrics:  # the tables are of all images; nothing is added before the next reset
            parts: List[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (self.outputs, self.targets))
            self.outputs = [output for outputs, _ in parts for output in outputs]
            self.targets = [target for _, targets in parts for target in targets]
        return scores

    def per_class(self) -> List[Dict[str, Any]]:
        """Compute average precision and F1 in percent, and the number of images, of every class.

        A score whose denominator is 0 is NaN: both of a class without images, unless it is predicted.
        """
        output, target = torch.cat(self.outputs), torch.cat(self.targets)
        predicted = output.sigmoid() >= self.threshold
        support = target.sum(dim=0)
        average_precision = _average_precision(output, target).where(support > 0, torch.nan)
        f1 = 2 * (predicted & target).sum(dim=0) / (predicted.sum(dim=0) + support)
        return [
            {'class': name, 'ap': 100 * float(ap), 'f1': 100 * float(score), 'support': int(count)}
            for name, ap, score, count in zip(self.class_names, average_precision, f1.double(), support, strict=True)
        ]

    def write(self, folder: str) -> None:
        """Write per_class.csv and predictions.safetensors (`logits` and `target`), if they were requested."""
        if not self.outputs:
            return
        if 'per-class' in self.metrics:
            write_records(os.path.join(folder, PER_CLASS_NAME), self.per_class())
        if 'predictions' in self.metrics:
            tensors = {'logits': torch.cat(self.outputs), 'target': torch.cat(self.targets).to(torch.uint8)}
            with write_whole(os.path.join(folder, OUTPUTS_NAME)) as path:
                save_file(tensors, path)

    @staticmethod
    def describe(scores: Mapping[str, float]) -> str:
        """Write the scores that compute() returned as a part of a log line."""
        return describe(scores, OF_LABEL_SETS)
