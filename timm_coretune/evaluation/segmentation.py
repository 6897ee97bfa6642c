"""How well every pixel is predicted: loss, accuracies and intersection over union, over all processes"""

import os
from collections import OrderedDict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn.functional as F

from ..checks import wrong_classes
from ..run_folder import CONFUSION_NAME, PER_CLASS_NAME
from .scores import describe
from .tables import complete_names, write_confusion, write_records


class SegmentationEvaluator:
    """Counts pixels by true and predicted class and reduces the counts, not the scores, over batches and processes.

    With n_ij pixels of class i predicted as j, t_i = sum_j n_ij of the class and p_i = sum_j n_ji predicted as it:
    PA = sum_i n_ii / sum_i t_i, MPA = mean of n_ii / t_i over the classes in the data,
    IoU_i = n_ii / (t_i + p_i - n_ii), mIoU = their mean over the classes in the data or predicted,
    FWIoU = sum_i t_i IoU_i / sum_i t_i.

    Args:
        num_classes: Classes of the model, at least 2.
        class_names: Their names by index, their indices when None.
        ignore_index: Target of the pixels that count nowhere.
        device: Where the counts are kept, that of the outputs.

    Raises:
        ImportError: torchmetrics is not installed.
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Optional[Sequence[str]] = None,
        ignore_index: int = 255,
        device: Optional[Union[str, torch.device]] = None,
    ):
        try:
            from torchmetrics import SumMetric
            from torchmetrics.classification import MulticlassConfusionMatrix
        except ImportError as e:
            raise ImportError(
                "Validation of a segmentation needs torchmetrics: pip install 'timm-coretune[seg]'"
            ) from e

        self.num_classes = num_classes
        self.class_names = complete_names(class_names, num_classes)
        self.ignore_index = ignore_index
        device = torch.device(device or 'cpu')
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index).to(device)
        # its check of values sorts all pixels and waits for the device; update has one of its own
        self.confusion.validate_args = False
        # a sum, as the matrix has the number of pixels; a NaN must be seen, and float64 counts exactly, MPS has none
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.loss = SumMetric(nan_strategy='disable').set_dtype(dtype).to(device)
        self.matrix: Optional[torch.Tensor] = None

    def reset(self) -> None:
        self.confusion.reset()
        self.loss.reset()
        self.matrix = None

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take a batch.

        Args:
            output: Logits of any floating dtype (batch_size, num_classes, height, width).
            target: Class indices, or ignore_index (batch_size, height, width).

        Raises:
            ValueError: The shapes do not fit, or a target is no class. The latter is checked on the CPU only, where it
                costs no device synchronisation; on an accelerator the kernel of the cross-entropy asserts it.
        """
        self._check(output, target)
        target = target.long()
        loss = F.cross_entropy(output.float(), target, ignore_index=self.ignore_index, reduction='sum')
        self.loss.update(loss)
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
        """Cross-entropy in nats and the four scores in percent. All processes must call this together."""
        self.matrix = self.confusion.compute().cpu()
        correct, pixels, union = self._counts()
        total = pixels.sum().clamp(min=1)
        iou = correct / union.clamp(min=1)
        return OrderedDict(
            loss=self.loss.compute().item() / total.item(),
            pa=(100 * correct.sum() / total).item(),
            mpa=(100 * (correct / pixels.clamp(min=1)).sum() / (pixels > 0).sum().clamp(min=1)).item(),
            miou=(100 * iou.sum() / (union > 0).sum().clamp(min=1)).item(),
            fwiou=(100 * (pixels * iou).sum() / total).item(),
        )

    def _counts(self) -> List[torch.Tensor]:
        """Of every class the pixels predicted correctly, in the data, and in the data or predicted, as float64."""
        if self.matrix is None:
            raise RuntimeError('Cannot tell of classes before compute() has counted their pixels.')
        matrix = self.matrix.double()
        correct, pixels, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
        return [correct, pixels, pixels + predicted - correct]

    def per_class(self) -> List[Dict[str, Any]]:
        """IoU and accuracy in percent, and the number of pixels, of every class; 0 where nothing is defined."""
        correct, pixels, union = self._counts()
        iou, accuracy = 100 * correct / union.clamp(min=1), 100 * correct / pixels.clamp(min=1)
        columns = (self.class_names, iou.tolist(), accuracy.tolist(), pixels.long().tolist())
        return [
            dict(zip(('class', 'iou', 'accuracy', 'pixels'), row, strict=True)) for row in zip(*columns, strict=True)
        ]

    def write(self, folder: str) -> None:
        """Write confusion.csv, a row for each true class, and per_class.csv."""
        write_records(os.path.join(folder, PER_CLASS_NAME), self.per_class())
        write_confusion(os.path.join(folder, CONFUSION_NAME), self.class_names, self.matrix.tolist())

    @staticmethod
    def describe(metrics: Mapping[str, float]) -> str:
        """The part of a log line that tells what compute returned."""
        return describe(metrics, ('loss', 'pa', 'mpa', 'miou', 'fwiou'))
