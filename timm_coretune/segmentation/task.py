"""Core-tuning for segmentation: the task for images, applied to anchor pixels of the feature map"""

from typing import Any, Dict, Optional, Union, cast

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..evaluation.segmentation import SegmentationEvaluator
from ..loss import TaskLoss
from ..loss.core_tuning import FOR_PIXELS
from ..mixup import protect_draws
from ..task import CoreTuningModule, CoreTuningTask
from .anchors import sample_anchors
from .dense import DenseCrossEntropy, check_masks
from .model import SegmentationModel


def label_of_cells(target: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Class (B, height * width) at the middle of each cell of a feature map, from masks (B, H, W)."""
    rows, columns = (
        (2 * torch.arange(num_cells, device=target.device) + 1) * num_pixels // (2 * num_cells)
        for num_cells, num_pixels in ((height, target.shape[1]), (width, target.shape[2]))
    )
    return target[:, rows[:, None], columns].flatten(1)


class SegmentationModule(CoreTuningModule):
    """Model and criterion in one module, which is wrapped, compiled and given to the optimizer.

    Args:
        model: The segmentation model.
        criterion: The loss of the anchors. Its parameters are trained together with the model.
        dense_loss: The cross-entropy of all pixels.
        anchors_per_image: Number of anchor pixels per image.
    """

    def __init__(
        self,
        model: SegmentationModel,
        criterion: TaskLoss,
        dense_loss: DenseCrossEntropy,
        anchors_per_image: int,
    ):
        super().__init__(model, criterion)
        self.dense_loss = dense_loss
        self.anchors_per_image = anchors_per_image

    def forward(
        self,
        input: Union[torch.Tensor, Dict[str, torch.Tensor]],
        target: Optional[torch.Tensor] = None,
        *prepared: Any,
    ) -> Any:
        """In training mode the losses, given the number of pixels that count in all images of all processes, the seeds
        of the images, and what the loss prepared. Else the logits."""
        if not self.training:
            return self.model(input)
        target = cast(torch.Tensor, target)
        num_pixels, seed, *prepared_by_loss = prepared
        features, logits, output = self.model.forward_pixels(input)
        dense_loss = self.dense_loss(output, target, num_pixels)
        padded = self.model.pad(target, value=self.dense_loss.ignore_index)
        label = label_of_cells(padded, *features.shape[2:])
        label = label.masked_fill(label == self.dense_loss.ignore_index, -1)
        hard = logits.argmax(dim=1).flatten(1) != label
        anchors = sample_anchors(label, hard, seed, self.anchors_per_image)
        label = label.gather(1, anchors.index).masked_fill(~anchors.is_pixel, -1).flatten()
        losses = self.criterion.compute(
            _take(features, anchors.index),
            _take(logits, anchors.index),
            label,
            *prepared_by_loss,
            clean_loss=dense_loss,
            **self.required(input),
        )
        return {**losses, 'dense_loss': dense_loss}


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows (B * A, D) of a feature map (B, D, h, w) at pixel indices (B, A)."""
    taken = x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1))
    return taken.transpose(1, 2).flatten(0, 1)


class SegmentationTask(CoreTuningTask):
    """Fine-tunes a segmentation model with Core-tuning.

    It does for pixels what CoreTuningTask does for images, with the same losses and the same mining over all processes.
    Mining and contrast use anchors, which are pixels of the feature map. Each image gives equally many anchors, from
    all its classes alike and badly predicted pixels first. The cross-entropy of clean images covers all pixels.

    Of Core-tuning's mixtures the classifier learns the semi-hard negatives, with weight 0.3 beside all pixels. In the
    paper it learns both kinds, each with weight 1: `smooth='both'`. docs/study.md compares the two.

    Args:
        model: A model from create_segmentation_model.
        criterion: The loss of the anchors, or its name in timm_coretune.loss.METHODS. When None, a CoreTuningLoss.
        anchors_per_image: Number of anchors per image. If it has fewer labelled pixels, some places stay empty.
        ignore_index: Mask value of pixels that are left out.
        device: Device for task tensors and the parameters of the loss.
        dtype: Dtype of the parameters of the loss. It should be that of the model, None for float32.
        verbose: Enable info logging.
        **loss_kwargs: Arguments of the loss except num_features, which follows from the model.

    Raises:
        ValueError: An argument is out of range, or both criterion and loss_kwargs are given.

    Examples:

        ```python
        task = SegmentationTask(create_segmentation_model('resnet50', num_classes=21, output_stride=8))
        result = task(input, target)  # images (B, 3, H, W) and masks (B, H, W)
        result['loss'].backward()
        ```
    """

    def __init__(
        self,
        model: SegmentationModel,
        criterion: Union[TaskLoss, str, None] = None,
        anchors_per_image: int = 64,
        ignore_index: int = 255,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
        **loss_kwargs: Any,
    ):
        if anchors_per_image < 1:
            raise ValueError(f'Expected anchors_per_image >= 1, got {anchors_per_image}.')
        if criterion in (None, 'core') and 'smooth' not in loss_kwargs:
            loss_kwargs = {**FOR_PIXELS, **loss_kwargs}
        self.anchors_per_image = anchors_per_image
        self.ignore_index = ignore_index
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose, **loss_kwargs)
        if not self.criterion.for_pixels:
            raise ValueError(f'Expected a loss with a meaning for pixels, got {type(self.criterion).__name__}.')
        if self.criterion.classification_loss is not None:
            raise ValueError(
                'Expected a loss with the cross-entropy, which leaves pixels out, got one with a classification_loss '
                'or multi_label=True.'
            )

    def check_model(self, model: nn.Module) -> None:
        """Does nothing: every SegmentationModel can be trained."""

    def get_feature_dim(self, model: nn.Module) -> int:
        return cast(SegmentationModel, model).num_features

    def create_module(self, model: nn.Module, criterion: TaskLoss) -> SegmentationModule:
        dense_loss = DenseCrossEntropy(self.ignore_index, criterion.label_smoothing, criterion.class_weight)
        return SegmentationModule(cast(SegmentationModel, model), criterion, dense_loss, self.anchors_per_image)

    def create_evaluator(self, **kwargs: Any) -> SegmentationEvaluator:
        """Create the evaluator of the outputs of the evaluation model, with further arguments of the evaluator."""
        num_classes = unwrap_model(self.trainable_module).model.num_classes
        return SegmentationEvaluator(num_classes, ignore_index=self.ignore_index, device=self.device, **kwargs)

    def forward(  # type: ignore[override]  # no model of segmentation takes a dictionary of patches
        self,
        input: torch.Tensor,
        target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        """One training step's forward pass.

        Args:
            input: Images (B, 3, H, W).
            target: Class indices (B, H, W) int64, ignore_index for pixels that are left out.

        Returns:
            Scalars in nats: 'loss' to minimise, 'task_loss', 'dense_loss' (cross-entropy of all pixels, a part of
            'task_loss') and, unless its weight is 0, 'contrast_loss'. There are no logits, as classifiers have, which
            would be a row for each pixel.

        Raises:
            ValueError: target does not fit the images or the classes of the model.
        """
        module = unwrap_model(self.trainable_module)
        check_masks(target, input, module.model.num_classes, self.ignore_index)
        num_pixels = module.dense_loss.count(target)
        module.criterion.check_updates(module.model)
        batch, *rest = module.criterion.prepare(input.shape[0], target.device, self.anchors_per_image)
        seed = module.criterion.draw_image_seeds(batch, target.device)
        return self.trainable_module(input, target, num_pixels, seed, batch, *protect_draws(rest))
