"""Measures the features of held-out images while a model is trained"""

import logging
import time
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import unwrap_model

from ...data.seeding import kept_generators
from ...evaluation.features import describe_features, measure_features
from ...loss.parts.forward import ClassifierInput, features_and_logits
from ...run_folder import FEATURES_PREFIX
from ...timm_model import get_feature_dim
from ..data.batches import num_own_samples, to_device

_logger = logging.getLogger(__name__)


class FeatureWatch:
    """Measures pre-logits features every few epochs: `measure_features` of validation images and training images.

    The training images are the neighbours that vote in kNN. Both are prepared as for validation. Features are computed
    by all processes, and figures of them by the first, in float64 on its CPU.

    Args:
        held_out: Loader of validation images, whose order is that of the images.
        bank: Loader of training images, likewise.
        interval: Epochs between measurements.
        accelerator: Device, processes and precision.
        channels_last: Put images into the channels_last memory layout.
        dtype: Dtype that images are cast to. None leaves them as the loader made them.
    """

    def __init__(
        self,
        held_out: Any,
        bank: Any,
        interval: int,
        accelerator: Accelerator,
        channels_last: bool = False,
        dtype: Optional[torch.dtype] = None,
    ):
        self.held_out, self.bank = held_out, bank
        self.interval = interval
        self.accelerator = accelerator
        self.channels_last = channels_last
        self.dtype = dtype

    def is_due(self, epoch: int, num_epochs: int) -> bool:
        """Whether features are measured after an epoch: every `interval` epochs, and after the last one."""
        return (epoch + 1) % self.interval == 0 or epoch + 1 == num_epochs

    def measure(self, model: nn.Module, name: str) -> Dict[str, float]:
        """Measure the features of a model. All processes must call this together.

        Args:
            model: A timm classifier on the device.
            name: What is measured, for the log.

        Returns:
            The figures by the names of their columns in the summary.
        """
        start, model = time.perf_counter(), unwrap_model(model)
        model.eval()
        with kept_generators(self.accelerator.device):  # loaders with worker processes draw their seeds
            parts = [*self._extract(model, self.held_out), *self._extract(model, self.bank)]
        # the others wait for the first, so that all have the same figures
        found = [measure_features(*parts) if self.accelerator.is_main_process else None]
        figures = next(figures for figures in gather_object(found) if figures is not None)
        _logger.info(f'Features ({name}): {describe_features(figures)}  Time: {time.perf_counter() - start:.3f}s')
        return {f'{FEATURES_PREFIX}{name}': value for name, value in figures.items()}

    @torch.no_grad()
    def _extract(self, model: Any, loader: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Features (N, D) in float32 and classes (N,) of all images, on the CPU, in the order of the data set."""
        accelerator, listener, width = self.accelerator, ClassifierInput(), get_feature_dim(model)
        features, labels = [], []
        for batch in loader:
            input, target = to_device(batch, accelerator.device, self.channels_last, self.dtype)
            with accelerator.autocast(), listener.of(model.get_classifier()):
                feature_map = None if isinstance(input, dict) else model.forward_features(input)
                found, _ = features_and_logits(model, input, feature_map, listener, width)
            features.append(found.float())
            labels.append(target.long())
        # a distributed sampler repeats images at the end, so that processes have equally many
        own = slice(num_own_samples(loader, accelerator))
        shares = gather_object([(torch.cat(features)[own].cpu(), torch.cat(labels)[own].cpu())])
        total = sum(len(share) for _, share in shares)
        # it deals images out to the processes in turn
        order = torch.cat([torch.arange(total)[rank :: len(shares)] for rank in range(len(shares))]).argsort()
        by_kind = zip(*shares, strict=True)
        found, classes = (torch.cat(parts)[order] for parts in by_kind)
        return found, classes
