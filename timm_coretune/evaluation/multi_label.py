"""Scores of a classifier of images with several labels, over all processes"""

import os
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.task.evaluator import MultiLabelClassificationEvaluator, _average_precision

from ..atomic import write_whole
from ..distributed import process_index_and_count
from ..run_folder import OUTPUTS_NAME, PER_CLASS_NAME
from .scores import OF_LABEL_SETS, describe
from .tables import complete_names, write_records


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

    def compute(self, distributed: Optional[bool] = None) -> Dict[str, float]:
        """Compute the scores by name over all processes. All processes must call this together."""
        if distributed is None:
            distributed = process_index_and_count()[1] > 1
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
