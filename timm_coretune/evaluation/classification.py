"""Metrics of a validation beyond loss and top-k, by torchmetrics"""

import logging
import os
from typing import Any, Dict, List, Optional, Sequence

import torch

from .tables import complete_names, write_confusion, write_records

_logger = logging.getLogger(__name__)


class EvalMetrics:
    """Confusion matrix, per-class precision, recall and F1, and calibration error, over all processes.

    Args:
        names: Of confusion, per-class and ece.
        num_classes: Classes of the model.
        class_names: Their names by index, their indices when None.
        accelerator: Device and processes.

    Raises:
        ImportError: torchmetrics is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_classes: int,
        class_names: Optional[List[str]],
        accelerator: Any,
    ):
        try:
            from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix
        except ImportError as e:
            raise ImportError("--metrics needs torchmetrics: pip install 'timm-coretune[metrics]'") from e

        self.names = tuple(names)
        self.class_names = complete_names(class_names, num_classes)
        self.confusion = MulticlassConfusionMatrix(num_classes).to(accelerator.device)
        self.calibration = None
        if 'ece' in names:
            self.calibration = MulticlassCalibrationError(num_classes, n_bins=15).to(accelerator.device)
        self.matrix: Optional[torch.Tensor] = None

    def reset(self) -> None:
        self.confusion.reset()
        if self.calibration is not None:
            self.calibration.reset()

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take logits (B, C) and class indices (B,)."""
        self.confusion.update(output, target)
        if self.calibration is not None:
            self.calibration.update(output.softmax(dim=1), target)

    def compute(self) -> Dict[str, float]:
        """Scalars for the summary: macro F1 in percent, expected calibration error in percent of 15 bins."""
        self.matrix = self.confusion.compute().cpu()
        scalars = {}
        if 'per-class' in self.names:
            # of the classes that are in the data
            rows = [row for row in self.per_class() if row['support']]
            scalars['macro_f1'] = sum(row['f1'] for row in rows) / max(len(rows), 1)
        if self.calibration is not None:
            scalars['ece'] = 100 * self.calibration.compute().item()
        return scalars

    def per_class(self) -> List[Dict[str, float]]:
        """Precision, recall and F1 in percent, and the number of images, of every class; 0 where nothing is defined."""
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
        """Write what was asked for as CSV, whole or not at all; the matrix has a row for each true class."""
        if 'confusion' in self.names:
            write_confusion(os.path.join(folder, 'confusion.csv'), self.class_names, self.matrix.tolist())
        if 'per-class' in self.names:
            write_records(os.path.join(folder, 'per_class.csv'), self.per_class())
