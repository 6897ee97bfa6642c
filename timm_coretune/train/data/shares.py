"""Takes a share of the images of each class, to train on or to hold out"""

import logging
import random
from typing import Any, Dict, List, Optional, Sequence, Tuple

from torch.utils.data import Dataset

from ...data.seeding import make_key
from .labelled import LabelledSubset, copy_of

_logger = logging.getLogger(__name__)


_HOLD_OUT_SEED = 0  # not --seed: else runs of other seeds would validate on images that this one was trained on


def _members(labels: Sequence[Any]) -> Dict[Any, List[int]]:
    """Indices of the images of each class."""
    members: Dict[Any, List[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return members


def take_fraction(dataset: Dataset, labels: Optional[Sequence[int]], fraction: float, seed: int) -> Dataset:
    """Take the same share of the images of each class, at least one, in their original order.

    Raises:
        ValueError: The labels are not known.
    """
    if fraction == 1:
        return dataset
    if labels is None:
        raise ValueError(
            'Expected a data set that knows the labels of all images for --label-fraction, as folders, safetensors, '
            'torch/ and hfds/ do. A stream does not.'
        )
    members = _members(labels)
    chosen: List[int] = []
    for label, indices in sorted(members.items()):
        draws = random.Random(make_key(seed, label))
        chosen += draws.sample(indices, max(1, round(fraction * len(indices))))
    return LabelledSubset(dataset, sorted(chosen))


def hold_out(dataset: Dataset, fraction: float, where: str, labels: Optional[Sequence[Any]]) -> Tuple[Dataset, Dataset]:
    """Hold out images of each class for validation, the same in every run whatever its seed.

    Args:
        dataset: The images to train on.
        fraction: Share of the images of each class to hold out, at least one image. A class of one image has none.
        where: The data, for the log.
        labels: Class of each image, None if they are not known.

    Returns:
        The images that are left to train on, and those that are held out.

    Raises:
        ValueError: The labels are not known, or nothing can be held out.
    """
    if labels is None:
        raise ValueError(
            f'Expected a validation split in {where}, from which no images can be held out, as it cannot tell the '
            "labels of all images. Name a split as --val-split, or give --val-split '' to validate nothing."
        )
    chosen: List[int] = []
    members = _members(labels)
    for _, indices in sorted(members.items(), key=lambda item: str(item[0])):
        count = min(max(1, round(fraction * len(indices))), len(indices) - (fraction < 1))
        chosen += random.Random(make_key(_HOLD_OUT_SEED, len(indices), len(chosen))).sample(indices, count)
    if not chosen:
        raise ValueError(f'Expected two images of a class in {where} to hold out one for validation, found none.')
    single = sum(len(indices) == 1 for indices in members.values())
    _logger.info(
        f'Validation on {len(chosen)} of the {len(labels)} images of {where}: {100 * fraction:g} % of each class are '
        f'held out, the same in every run (--val-fraction).'
        + (f' {single} class(es) of one image have none in the validation.' if single and fraction < 1 else '')
    )
    held = set(chosen)
    return (
        LabelledSubset(dataset, [index for index in range(len(labels)) if index not in held]),
        LabelledSubset(copy_of(dataset), sorted(chosen)),
    )
