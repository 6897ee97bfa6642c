"""Let models predict images of a data set, as many as fit"""

from typing import Any, List, NamedTuple, Sequence, Sized, cast

import torch
from torch.utils.data import Dataset, IterableDataset

from ..data.images import UnreadableImageError
from ..prediction.predictor import Predictor, stack_features
from .html import number

_CHUNK = 64  # images that are held at once


class Looked(NamedTuple):
    """What models say of the images of a split.

    Attributes:
        dataset: The split.
        indices: Indices of the images in it.
        labels: Their classes (N,).
        predicted: Classes that the first model says (N,).
        probability: Their probabilities by it (N,).
        features: Features (N, D) by each model.
        source: Which images these are, in words.
    """

    dataset: Any
    indices: List[int]
    labels: torch.Tensor
    predicted: torch.Tensor
    probability: torch.Tensor
    features: List[torch.Tensor]
    source: str


def look(dataset: Dataset, models: Sequence[Predictor], max_images: int, what: str) -> Looked:
    """Let models predict images of a split: all of them, or as many as max_images, chosen alike in every call.

    Args:
        dataset: The split, whose images are of PIL.
        models: The models.
        max_images: Number of images to look at, at most.
        what: What they are called.

    Raises:
        ValueError: The split is a stream, or none of its images can be read.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f'the {what} are a stream, of which single images cannot be taken')
    total = len(cast(Sized, dataset))
    indices = list(range(total))
    if total > max_images:
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:max_images]
        indices = chosen.sort().values.tolist()
    seen: List[int] = []
    labels: List[int] = []
    rows: List[List[Any]] = [[] for _ in models]
    for start in range(0, len(indices), _CHUNK):
        images = []
        for index in indices[start : start + _CHUNK]:
            try:
                image, label = cast(Any, dataset)[index]
            except UnreadableImageError:
                continue
            seen.append(index)
            images.append(image)
            labels.append(int(label))
        for found, model in zip(rows, models, strict=True):
            found += model.iterate(images, with_features=True)
    if not seen:
        raise ValueError(f'none of the {what} can be read')
    source = (
        f'{number(len(seen), 0)} of {number(total, 0)} {what}'
        if len(seen) < total
        else f'all {number(total, 0)} {what}'
    )
    if len(seen) < len(indices):
        source += f' ({len(indices) - len(seen)} cannot be read)'
    return Looked(
        dataset,
        seen,
        torch.tensor(labels),
        torch.tensor([prediction.indices[0] for prediction, _ in rows[0]]),
        torch.tensor([prediction.probabilities[0] for prediction, _ in rows[0]]),
        [stack_features([row for _, row in found]) for found in rows],
        source,
    )
