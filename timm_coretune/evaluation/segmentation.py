"""Scores of a segmentation model over all processes: loss, pixel accuracies, intersection over union (IoU)"""

import os
from collections import OrderedDict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn.functional as F

from ..checks import wrong_classes
from ..distributed import sum_over_processes
from ..run_folder import CONFUSION_NAME, PER_CLASS_NAME
from .confusion import ConfusionMatrix
from .scores import describe
from .tables import complete_names, write_confusion, write_records


class SegmentationEvaluator:
    """Computes cross-entropy, pixel accuracies and IoU from one confusion matrix over all batches and processes.

    The counts of pixels are summed over batches and processes, and the scores are computed from the sums. Let n_ij be
    the number of pixels of class i that are predicted as class j, t_i = sum_j n_ij the number of pixels of class i, and
    p_i = sum_j n_ji the number of pixels that are predicted as class i. Then

    - PA (pixel accuracy) = sum_i n_ii / sum_i t_i
    - MPA (mean pixel accuracy) = mean of n_ii / t_i over the classes in the data
    - IoU_i (intersection over union) = n_ii / (t_i + p_i - n_ii)
    - mIoU = mean of IoU_i over the classes that are in the data or predicted
    - FWIoU (frequency-weighted IoU) = sum_i t_i IoU_i / sum_i t_i

    Args:
        num_classes: Number of classes of the model, at least 2.
        class_names: Names of the classes by index. When None their indices.
        ignore_index: Target value of the pixels to ignore.
        device: Device of the outputs, where the counts are kept. When None the CPU.

    Raises:
        ValueError: There are less than 2 classes.
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Optional[Sequence[str]] = None,
        ignore_index: int = 255,
        device: Optional[Union[str, torch.device]] = None,
    ):
        if num_classes < 2:
            raise ValueError(
                f'Expected at least 2 classes, got {num_classes}. Masks have a class for the background too: check '
                'num_classes, and which values the masks have.'
            )
        self.num_classes = num_classes
        self.class_names = complete_names(class_names, num_classes)
        self.ignore_index = ignore_index
        device = torch.device(device or 'cpu')
        self.confusion = ConfusionMatrix(num_classes, device, ignore_index)
        # Sum the losses of all pixels; the matrix has their number. float64 sums many pixels without loss of precision,
        # but MPS does not support it.
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.loss_sum = torch.zeros((), dtype=dtype, device=device)
        self.matrix: Optional[torch.Tensor] = None

    def reset(self) -> None:
        self.confusion.reset()
        self.loss_sum.zero_()
        self.matrix = None

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch.

        Args:
            output: Logits of any floating dtype (batch_size, num_classes, height, width).
            target: Class indices or ignore_index (batch_size, height, width).

        Raises:
            ValueError: The shapes do not fit, or a target value is no class. Values are checked on the CPU only. On an
                accelerator the check would wait for the device, and the kernel of the cross-entropy asserts it.
        """
        self._check(output, target)
        target = target.long()
        loss = F.cross_entropy(output.float(), target, ignore_index=self.ignore_index, reduction='sum')
        self.loss_sum += loss
        self.confusion.update(output.argmax(dim=1), target)

    def _check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        if output.ndim != 4 or output.shape[1] != self.num_classes or target.shape != output[:, 0].shape:
            raise ValueError(
                f'Expected logits (batch_size, {self.num_classes}, height, width) and class indices (batch_size, '
                f'height, width), got {tuple(output.shape)} and {tuple(target.shape)}. Resize the logits to the masks, '
                'and check num_classes.'
            )
        if target.device.type != 'cpu':
            return
        wrong = wrong_classes(target, self.num_classes, self.ignore_index)
        if wrong.numel():
            raise ValueError(
                f'Expected class indices in [0, {self.num_classes - 1}] or {self.ignore_index} for pixels to ignore, '
                f'got {wrong.unique()[:5].tolist()}. Check num_classes and the ignored index against the masks.'
            )

    def compute(self) -> Dict[str, float]:
        """Compute the cross-entropy in nats and the other scores in percent. All processes must call this together."""
        self.matrix = self.confusion.compute()
        correct, pixels, union = self._counts()
        total = pixels.sum().clamp(min=1)
        iou = correct / union.clamp(min=1)
        return OrderedDict(
            loss=sum_over_processes(self.loss_sum).item() / total.item(),
            pa=(100 * correct.sum() / total).item(),
            mpa=(100 * (correct / pixels.clamp(min=1)).sum() / (pixels > 0).sum().clamp(min=1)).item(),
            miou=(100 * iou.sum() / (union > 0).sum().clamp(min=1)).item(),
            fwiou=(100 * (pixels * iou).sum() / total).item(),
        )

    def _computed_matrix(self) -> torch.Tensor:
        if self.matrix is None:
            raise RuntimeError('Cannot give scores of each class before compute().')
        return self.matrix

    def _counts(self) -> List[torch.Tensor]:
        """Count the pixels of every class i: n_ii, t_i and t_i + p_i - n_ii in the notation of the class docstring."""
        matrix = self._computed_matrix().double()
        correct, pixels, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
        return [correct, pixels, pixels + predicted - correct]

    def per_class(self) -> List[Dict[str, Any]]:
        """Compute IoU and accuracy in percent, and the number of pixels, of every class.

        A class without pixels has no accuracy: it is NaN. So is its IoU, if it is not predicted either. The means that
        compute() returns leave these classes out.

        Raises:
            RuntimeError: compute() was not called yet.
        """
        correct, pixels, union = self._counts()
        iou, accuracy = 100 * correct / union, 100 * correct / pixels
        columns = (self.class_names, iou.tolist(), accuracy.tolist(), pixels.long().tolist())
        return [
            dict(zip(('class', 'iou', 'accuracy', 'pixels'), row, strict=True)) for row in zip(*columns, strict=True)
        ]

    def write(self, folder: str) -> None:
        """Write per_class.csv, where a score that a class does not have is empty, and confusion.csv."""
        write_records(os.path.join(folder, PER_CLASS_NAME), self.per_class())
        write_confusion(os.path.join(folder, CONFUSION_NAME), self.class_names, self._computed_matrix().tolist())

    @staticmethod
    def describe(metrics: Mapping[str, float]) -> str:
        """Write the scores that compute() returned as a part of a log line."""
        return describe(metrics, ('loss', 'pa', 'mpa', 'miou', 'fwiou'))
