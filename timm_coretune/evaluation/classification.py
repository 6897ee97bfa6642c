"""How well images are classified: loss and top-k accuracy, and what --metrics adds, over all processes"""

import os
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from timm.task.evaluator import ClassificationEvaluator as TopKEvaluator

from ..distributed import process_index_and_count
from ..run_folder import CONFUSION_NAME, PER_CLASS_NAME
from .scores import OF_IMAGES, describe
from .tables import complete_names, write_confusion, write_records


class ClassificationEvaluator(TopKEvaluator):
    """Cross-entropy in nats, top-1 and top-5 accuracy in percent, and further metrics if asked for.

    timm's evaluator counts. It averages the loss over each batch first, while here the losses of all images are summed.

    Args:
        device: Where the outputs are.
        metrics: Further metrics: 'confusion' (a table), 'per-class' (a table and macro F1), 'ece' (calibration error).
        num_classes: Classes of the model. Needed by the further metrics.
        class_names: Names of the classes by index, their indices when None.

    Raises:
        ImportError: Further metrics were asked for, and torchmetrics is not installed.
    """

    def __init__(
        self,
        device: Optional[torch.device] = None,
        metrics: Sequence[str] = (),
        num_classes: int = 0,
        class_names: Optional[Sequence[str]] = None,
    ):
        self.metrics = tuple(metrics)
        self.class_names = complete_names(class_names, num_classes)
        self.matrix: Optional[torch.Tensor] = None
        self.confusion = self.calibration = None
        if metrics:
            try:
                from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix
            except ImportError as e:
                raise ImportError("--metrics needs torchmetrics: pip install 'timm-coretune[metrics]'") from e
            self.confusion = MulticlassConfusionMatrix(num_classes).to(device)
            if 'ece' in metrics:
                self.calibration = MulticlassCalibrationError(num_classes, n_bins=15).to(device)
        super().__init__(device, criterion=nn.CrossEntropyLoss(reduction='sum'))

    def reset(self) -> None:
        super().reset()
        for metric in (self.confusion, self.calibration):
            if metric is not None:
                metric.reset()

    def _accumulate_loss(self, loss: torch.Tensor, num_examples: int) -> None:
        self.loss_sum += loss.to(self.loss_sum.dtype)
        self.counts[0] += num_examples

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take logits of any floating dtype (batch_size, num_classes) and class indices int64 (batch_size,)."""
        super().update(output, target)
        if self.confusion is not None:
            self.confusion.update(output, target)
        if self.calibration is not None:
            self.calibration.update(output.softmax(dim=1), target)

    def compute(self, distributed: Optional[bool] = None) -> Dict[str, float]:
        """The scores by name, over all processes, which must call this together."""
        if distributed is None:
            distributed = process_index_and_count()[1] > 1
        scores = super().compute(distributed)
        if self.confusion is not None:
            self.matrix = self.confusion.compute().cpu()
        if 'per-class' in self.metrics:
            # of the classes that are in the data
            rows = [row for row in self.per_class() if row['support']]
            scores['macro_f1'] = sum(row['f1'] for row in rows) / max(len(rows), 1)
        if self.calibration is not None:
            scores['ece'] = 100 * self.calibration.compute().item()
        return scores

    def per_class(self) -> List[Dict[str, Any]]:
        """Precision, recall and F1 in percent, and the number of images, of every class; 0 where nothing is defined.

        Raises:
            RuntimeError: compute() has not counted the images yet, or no further metrics were asked for.
        """
        if self.matrix is None:
            raise RuntimeError('Cannot tell of classes before compute() has counted their images, with metrics.')
        matrix = self.matrix.double()
        rows = []
        for index, name in enumerate(self.class_names):
            correct, images, predicted = matrix[index, index], matrix[index].sum(), matrix[:, index].sum()
            rows.append(
                {
                    'class': name,
                    'precision': (100 * correct / predicted.clamp(min=1)).item(),
                    'recall': (100 * correct / images.clamp(min=1)).item(),
                    'f1': (200 * correct / (images + predicted).clamp(min=1)).item(),
                    'support': int(images),
                }
            )
        return rows

    def write(self, folder: str) -> None:
        """Write the tables that were asked for. The confusion matrix has a row for each true class."""
        if 'confusion' in self.metrics and self.matrix is not None:
            write_confusion(os.path.join(folder, CONFUSION_NAME), self.class_names, self.matrix.tolist())
        if 'per-class' in self.metrics:
            write_records(os.path.join(folder, PER_CLASS_NAME), self.per_class())

    @staticmethod
    def describe(scores: Mapping[str, float]) -> str:
        """The part of a line of the log that tells what compute returned."""
        return describe(scores, OF_IMAGES)
