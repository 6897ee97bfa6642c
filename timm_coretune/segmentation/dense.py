"""Cross-entropy of all pixels of a batch of images"""

from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..checks import wrong_classes
from ..distributed import process_index_and_count, sum_over_processes


class DenseCrossEntropy(nn.Module):
    """Cross-entropy, averaged over the pixels of all processes that are not ignored.

    Args:
        ignore_index: Target value of the pixels to ignore.
        label_smoothing: Share of the target that is spread evenly over all classes, in [0, 1).
        class_weight: Weight of each class (C,). The mean is over the pixels, and not over their weights.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        class_weight: Optional[torch.Tensor] = None,
    ):
        super().__init__()
        self.class_weight: Optional[torch.Tensor]
        self.register_buffer('class_weight', class_weight, persistent=False)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def count(self, target: torch.Tensor) -> torch.Tensor:
        """Number of pixels of all processes that are not ignored, a scalar. The processes exchange their numbers."""
        return sum_over_processes((target != self.ignore_index).sum())

    def forward(
        self,
        output: torch.Tensor,
        target: torch.Tensor,
        num_pixels: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """
        Args:
            output: Logits of any floating dtype (B, C, H, W).
            target: Class indices (B, H, W) int64.
            num_pixels: What `count` returns. Counted before the forward pass of a network, the exchange does not make
                the network wait for the other processes. When None it is counted here.

        Returns:
            The loss of this process in nats, a scalar of float32 or better. The average of the losses of all processes
            is the mean over all their pixels. If all pixels are ignored it is 0, attached to the graph.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        total = F.cross_entropy(
            output,
            target,
            weight=None if self.class_weight is None else self.class_weight.to(output.dtype),
            ignore_index=self.ignore_index,
            reduction='sum',
            label_smoothing=self.label_smoothing,
        )
        num_pixels = self.count(target) if num_pixels is None else num_pixels
        return total * process_index_and_count()[1] / num_pixels.clamp(min=1)


def check_masks(target: torch.Tensor, input: torch.Tensor, num_classes: int, ignore_index: int) -> None:
    """Reject targets that are not a class index for every pixel of a batch.

    The range is checked on the CPU only. On an accelerator the check would wait for the device.

    Args:
        target: Class indices to check (B, H, W).
        input: Images that they belong to (B, 3, H, W).
        num_classes: Number of classes of the model.
        ignore_index: Target value of the pixels to ignore.

    Raises:
        ValueError: Shape, dtype or range of the target does not fit.
    """
    expected = (input.shape[0], *input.shape[2:])
    if target.shape != expected or target.dtype != torch.int64:
        raise ValueError(
            f'Expected a class index for every pixel, int64 {expected}, of images {tuple(input.shape)}, got '
            f'{target.dtype} {tuple(target.shape)}.'
        )
    if target.device.type == 'cpu' and target.numel():
        wrong = wrong_classes(target, num_classes, ignore_index)
        if len(wrong):
            raise ValueError(
                f'Expected class indices in [0, {num_classes - 1}], or {ignore_index} for pixels that do not count, '
                f'got {int(wrong[0])}. Check num_classes against the masks.'
            )
