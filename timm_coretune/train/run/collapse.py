"""Looks at the features of data with two classes before and after a training with contrast, and warns of a collapse"""

import logging
from typing import Any, List, Optional, Sequence, Tuple, cast

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model

from ...data.seeding import kept_generators
from ...evaluation.collapse import ClassAlignment, describe_alignment, find_collapse, measure_alignment
from ...loss import METHODS
from ..cli.settings import Settings
from ..data.batches import to_device
from ..loop import Trainer

_logger = logging.getLogger(__name__)

_NUM_IMAGES = 1000  # that are looked at; it takes four times as many forward passes
_AREA = (0.5, 1.0)  # of the crops that are the views of an image, as shares of it


class TwoClasses:
    """Measures SAA and CAC of two classes on validation images.

    Only the main process looks, at those validation images that it has itself.

    Args:
        trainer: Trains the classifier.
        loader: Validation batches of images and class indices.
        names: Names of the two classes.
    """

    def __init__(self, trainer: Trainer, loader: Any, names: Sequence[str]):
        self.trainer, self.loader, self.names = trainer, loader, names
        self.before: Optional[List[ClassAlignment]] = None

    def look_before(self) -> None:
        """Log the measures of the model that is going to be trained."""
        self.before = self._measure('before the training')

    def look_after(self) -> None:
        """Log the measures of the trained model, and warn with what to do if the features collapsed."""
        after = self._measure('after the training')
        lost = find_collapse(self.before, after, self.names)
        if lost:
            _logger.warning(
                f'{" ".join(lost)} Contrast pulls images of a class together: a lower --contrast-weight, '
                '--class-balance or --method bcl, in which both classes weigh alike, keep more that tells them apart.'
            )

    def _measure(self, when: str) -> List[ClassAlignment]:
        with kept_generators(self.trainer.accelerator.device):
            first, second, label = self._features()
        found = measure_alignment(first, second, label)
        _logger.info(f'Features {when}, of {len(label)} validation images: {describe_alignment(found, self.names)}.')
        return found

    @torch.no_grad()
    def _features(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pre-logits features of two views of each image, and the classes."""
        model: Any = unwrap_model(self.trainer.task.get_eval_model())
        device, was_training = self.trainer.accelerator.device, model.training
        model.eval()
        generator = torch.Generator().manual_seed(0)  # the same views before and after
        views: List[List[torch.Tensor]] = [[], []]
        labels: List[torch.Tensor] = []
        config = self.trainer.config
        for batch in self.loader:
            images, target = to_device(batch, device, config.channels_last, config.dtype)
            for features in views:
                with self.trainer.accelerator.autocast():
                    feature_map = model.forward_features(crop_randomly(cast(torch.Tensor, images), generator))
                    features.append(model.forward_head(feature_map, pre_logits=True).float())
            labels.append(target)
            if sum(map(len, labels)) >= _NUM_IMAGES:
                break
        model.train(was_training)
        first, second = (torch.cat(features)[:_NUM_IMAGES] for features in views)
        return first, second, torch.cat(labels)[:_NUM_IMAGES]


def crop_randomly(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random crops (B, C, H, W) of images, resized to their size, and half of them mirrored."""
    draws = torch.rand(4, len(images), generator=generator).to(images.device)
    side = (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[0]).sqrt()
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = side * (1 - 2 * (draws[1] < 0.5).float())
    theta[:, 1, 1] = side
    theta[:, :, 2] = ((1 - side) * (2 * draws[2:] - 1)).T
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode='reflection', align_corners=False).to(images.dtype)


def watch_two_classes(
    settings: Settings, trainer: Trainer, loader: Any, names: Optional[Sequence[str]]
) -> Optional[TwoClasses]:
    """What looks at the features of two classes, None where there is nothing to look at or it cannot be.

    Args:
        settings: Settings of the run.
        trainer: Trains the model.
        loader: Validation batches, None without.
        names: Names of the classes, None if they are not known.
    """
    data, method = settings.data, settings.loss.task_loss
    if method is None or not METHODS[method].contrasts or loader is None or not trainer.accelerator.is_main_process:
        return None
    if data.segmentation or data.is_multi_label or data.naflex_loader or trainer.is_sharded or trainer.config.tta > 1:
        return None
    model: Any = unwrap_model(trainer.task.get_eval_model())
    if model.num_classes != 2:
        return None
    return TwoClasses(trainer, loader, names or ('0', '1'))
