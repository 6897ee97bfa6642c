"""Counts how often each class is predicted as each other, without waiting for the device"""

from typing import Optional, Union

import torch

from ..distributed import sum_over_processes


class ConfusionMatrix:
    """Counts pairs of a true and a predicted class over batches and processes.

    Images or pixels to ignore are counted in a place of their own: leaving them out would need their number, for which
    the host would wait for the device.

    Args:
        num_classes: Number of classes.
        device: Device of the classes, where the counts are kept. When None the CPU.
        ignore_index: Value of true classes that are not counted. None counts all.
    """

    def __init__(
        self,
        num_classes: int,
        device: Optional[Union[str, torch.device]] = None,
        ignore_index: Optional[int] = None,
    ):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)  # the last are ignored

    def reset(self) -> None:
        self.counts.zero_()

    def update(self, predicted: torch.Tensor, target: torch.Tensor) -> None:
        """Count a batch of classes of any shape, int64. All must be in [0, num_classes), or true and ignored."""
        pair = target * self.num_classes + predicted
        if self.ignore_index is not None:
            pair = pair.masked_fill(target == self.ignore_index, self.num_classes**2)
        # bincount would ask the device for the greatest value
        self.counts.index_add_(0, pair.flatten(), self.counts.new_ones(()).expand(pair.numel()))

    def compute(self) -> torch.Tensor:
        """Counts over all processes, on the CPU: a row for each true class. All processes must call this together."""
        counts = sum_over_processes(self.counts).cpu()
        return counts[:-1].reshape(self.num_classes, self.num_classes)
