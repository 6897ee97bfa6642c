"""Scores of an image classifier over all processes: loss, top-k accuracy, and the metrics of --metrics"""

import os
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from timm.task.evaluator import ClassificationEvaluator as TopKEvaluator

from ..distributed import process_index_and_count
from ..run_folder import CONFUSION_NAME, PER_CLASS_NAME
from .confusion import ConfusionMatrix
from .scores import OF_IMAGES, describe
from .tables import complete_names, write_confusion, write_records


class ClassificationEvaluator(TopKEvaluator):
    """Computes cross-entropy in nats, top-1 and top-5 accuracy in percent, and further metrics on request.

    It differs from timm's evaluator in the loss: it sums the losses of all images and divides once. The mean is exact
    also if the batches have different sizes.

    Args:
        device: Device of the outputs.
        metrics: Further metrics: 'confusion' (a table), 'per-class' (a table and macro F1), 'ece' (calibration error).
        num_classes: Number of classes of the model. Required for further metrics.
        class_names: Names of the classes by index. When None their indices.

    Raises:
        ImportError: The calibration error is one of them, and torchmetrics is not installed.
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
        self.confusion = ConfusionMatrix(num_classes, device) if metrics else None
        self.calibration: Any = None
        # for the calibration error: probability of the predicted class of each image, and whether it is right
        self.confidences: List[torch.Tensor] = []
        self.hits: List[torch.Tensor] = []
        if 'ece' in metrics:
            try:
                from torchmetrics.classification import BinaryCalibrationError
            except ImportError as e:
                raise ImportError("--metrics ece needs torchmetrics: pip install 'timm-coretune[metrics]'") from e
            self.calibration = BinaryCalibrationError(n_bins=15).to(device)
        super().__init__(device, criterion=nn.CrossEntropyLoss(reduction='sum'))

    def reset(self) -> None:
        super().reset()
        if self.confusion is not None:
            self.confusion.reset()
        self.confidences = [torch.zeros(0, device=self.device)]
        self.hits = [torch.zeros(0, dtype=torch.bool, device=self.device)]

    def _accumulate_loss(self, loss: torch.Tensor, num_examples: int) -> None:
        self.loss_sum += loss.to(self.loss_sum.dtype)
        self.counts[0] += num_examples

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits of any floating dtype (batch_size, num_classes) and class indices int64 (batch_size,)."""
        super().update(output, target)
        if self.confusion is not None:
            self.confusion.update(output.argmax(dim=1), target)
        if self.calibration is not None:
            confidence, predicted = output.softmax(dim=1).max(dim=1)
            self.confidences.append(confidence)
            self.hits.append(predicted == target)

    def compute(self, distributed: Optional[bool] = None) -> Dict[str, float]:
        """Compute the scores by name over all processes. All processes must call this together."""
        if distributed is None:
            distributed = process_index_and_count()[1] > 1
        scores = super().compute(distributed)
        if self.confusion is not None:
            self.matrix = self.confusion.compute()
        if 'per-class' in self.metrics:
            # macro F1 is the mean over the classes that occur in the data
            rows = [row for row in self.per_class() if row['support']]
            scores['macro_f1'] = sum(row['f1'] for row in rows) / max(len(rows), 1)
        if self.calibration is not None:
            scores['ece'] = self._calibration_error()
        return scores

    def _calibration_error(self) -> float:
        # torchmetrics checks the values of what it is given, for which it waits: once here, not in every batch
        self.calibration.reset()
        self.calibration.update(torch.cat(self.confidences), torch.cat(self.hits).long())
        return 100 * self.calibration.compute().item()

    def per_class(self) -> List[Dict[str, Any]]:
        """Compute precision, recall and F1 in percent, and the number of images, of every class.

        A score whose denominator is 0 is NaN: the recall of a class without images, the precision of a class that is
        never predicted, the F1 of a class that is neither there nor predicted.

        Raises:
            RuntimeError: compute() was not called yet, or the evaluator was created without further metrics.
        """
        if self.matrix is None:
            raise RuntimeError('Cannot give scores of each class before compute(), or without metrics.')
        matrix = self.matrix.double()
        rows = []
        for index, name in enumerate(self.class_names):
            correct, images, predicted = matrix[index, index], matrix[index].sum(), matrix[:, index].sum()
            rows.append(
                {
                    'class': name,
                    'precision': (100 * correct / predicted).item(),
                    'recall': (100 * correct / images).item(),
                    'f1': (200 * correct / (images + predicted)).item(),
                    'support': int(images),
                }
            )
        return rows

    def write(self, folder: str) -> None:
        """Write confusion.csv (a row for each true class) and per_class.csv, if these metrics were requested.

        A score that a class does not have is empty in per_class.csv.
        """
        if 'confusion' in self.metrics and self.matrix is not None:
            write_confusion(os.path.join(folder, CONFUSION_NAME), self.class_names, self.matrix.tolist())
        if 'per-class' in self.metrics:
            write_records(os.path.join(folder, PER_CLASS_NAME), self.per_class())

    @staticmethod
    def describe(scores: Mapping[str, float]) -> str:
        """Write the scores that compute() returned as a part of a log line."""
        return describe(scores, OF_IMAGES)
