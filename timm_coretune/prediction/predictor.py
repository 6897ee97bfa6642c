"""Classify images in batches"""

import os
import sys
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from tqdm import tqdm

from .classifier import Classifier, load_classifier
from .images import ImagesToPredict, collate

ImageLike = Union[str, os.PathLike, Image.Image]
Images = Union[ImageLike, torch.Tensor, Sequence[Union[ImageLike, torch.Tensor]]]


class Prediction(NamedTuple):
    """What the model says of an image.

    Attributes:
        labels: Names of the most probable classes, the best first. Empty if the image cannot be read.
        probabilities: Their probabilities, in the same order. With several labels an image each is one of its own.
        indices: Their indices.
        error: Why the image cannot be read, None if it can.
    """

    labels: List[str]
    probabilities: List[float]
    indices: List[int]
    error: Optional[str] = None

    @property
    def label(self) -> Optional[str]:
        """Name of the most probable class, None if the image cannot be read."""
        return self.labels[0] if self.labels else None


def stack_features(rows: Sequence[Optional[torch.Tensor]]) -> torch.Tensor:
    """Features of images (N, D) from those of each (D,), NaN where an image could not be read."""
    width = next((len(row) for row in rows if row is not None), 0)
    missing = torch.full((width,), float('nan'))
    return torch.stack([missing if row is None else row for row in rows])


class Predictor:
    """Classifies images with a tuned model. Images are prepared as in its validation.

    Args:
        source: Output folder of train.py, folder of an exported model, or `hf-hub:owner/name[@revision]`. Or a
            classifier that is loaded, on the device and in evaluation mode.
        device: Device to compute on. When None a GPU if there is one.
        batch_size: Number of images that are computed at once.
        workers: Processes that open images. 0 opens them in this one.
        amp: Compute in bfloat16 where that is enough.
        topk: Number of classes of a prediction. All if the model has less.

    Raises:
        ValueError: The source has no classifier, or an argument is out of its range.

    Examples:

        ```python
        predictor = Predictor('output/train/RUN')
        for path, prediction in zip(paths, predictor(paths)):
            print(path, prediction.label, prediction.probabilities[0])
        ```
    """

    def __init__(
        self,
        source: Union[str, os.PathLike, Classifier],
        device: Optional[Union[str, torch.device]] = None,
        batch_size: int = 64,
        workers: int = 0,
        amp: bool = False,
        topk: int = 5,
    ):
        if batch_size < 1 or topk < 1 or workers < 0:
            raise ValueError(
                f'Expected batch_size and topk >= 1, and workers >= 0, got {batch_size}, {topk} and {workers}.'
            )
        self.device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        found = source if isinstance(source, Classifier) else load_classifier(source, self.device)
        self.model, self.data_config, self.class_names, self.multi_label = found
        if found is not source:
            self.model.to(memory_format=torch.channels_last)
        self.transform = create_transform(**self.data_config)
        self.batch_size = batch_size
        self.workers = workers
        self.amp = amp
        self.topk = min(topk, len(self.class_names))

    def __call__(self, images: Images, progress: bool = False) -> List[Prediction]:
        """Classify images.

        Args:
            images: Paths or PIL images, or one of them. Or tensors (C, H, W) that are prepared already.
            progress: Show a bar on a terminal.

        Returns:
            A prediction for each image, in their order. One that cannot be read has no label, but the reason.
        """
        return [prediction for prediction, _ in self.iterate(images, progress=progress)]

    def features(self, images: Images, progress: bool = False) -> torch.Tensor:
        """Pre-logits features of images (N, D) in float32. Those of an image that cannot be read are NaN."""
        return stack_features([row for _, row in self.iterate(images, with_features=True, progress=progress)])

    def iterate(
        self,
        images: Images,
        with_features: bool = False,
        progress: bool = False,
    ) -> Iterator[Tuple[Prediction, Optional[torch.Tensor]]]:
        """Yield the prediction of each image in turn, and its pre-logits features (D,) on request."""
        is_one = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, 'ndim', None) == 3
        listed: List[Any] = [images] if is_one else [*images]  # type: ignore[misc]
        mode = 'RGB' if self.data_config['input_size'][0] == 3 else 'L'
        loader = DataLoader(
            ImagesToPredict(listed, self.transform, mode),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type == 'cuda',
        )
        with tqdm(total=len(listed), desc='Predict', disable=not (progress and sys.stderr.isatty())) as bar:
            for batch, reasons in loader:
                found = iter(()) if batch is None else self._predict(batch, with_features)
                for reason in reasons:
                    yield next(found) if reason is None else (Prediction([], [], [], reason), None)
                bar.update(len(reasons))

    @torch.inference_mode()
    def _predict(self, batch: torch.Tensor, with_features: bool) -> Iterator[Any]:
        batch = batch.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        features = None
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            if with_features:
                feature_map = self.model.forward_features(batch)
                features = self.model.forward_head(feature_map, pre_logits=True)
                logits = self.model.forward_head(feature_map)
            else:
                logits = self.model(batch)
        probability = logits.float().sigmoid() if self.multi_label else logits.float().softmax(dim=1)
        values, indices = (x.tolist() for x in probability.topk(self.topk))
        rows = [None] * len(values) if features is None else features.float().cpu().unbind()
        return iter(
            [
                (Prediction([self.class_names[i] for i in index], value, index), row)
                for value, index, row in zip(values, indices, rows, strict=True)
            ]
        )
