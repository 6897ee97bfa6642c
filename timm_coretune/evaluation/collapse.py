"""Measures whether the features of two classes collapse: SAA and CAC, from views of images

Paper: `A Tale of Two Classes: Adapting Supervised Contrastive Learning to Binary Imbalanced Datasets`
    - David Mildenberger, Paul Hager et al., CVPR 2025, https://arxiv.org/abs/2503.17024
Written from the definitions. CAC differs where a class is small, see ClassAlignment.
"""

from typing import List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F

NEIGHBOURHOOD = 0.05  # share of all views that are near


class ClassAlignment(NamedTuple):
    """How the views of one class lie among those of both, in percent.

    Attributes:
        saa: Sample alignment accuracy: share of the views whose nearest view is the other one of the same image. It
            falls if all images of the class get the same features.
        cac: Class alignment consistency: mean share of the own class among the nearest views, which are 5 % of all. Of
            a class with fewer views they are as many as it has. It falls if the class lies within the other one.
    """

    saa: float
    cac: float


def measure_alignment(first: torch.Tensor, second: torch.Tensor, label: torch.Tensor) -> List[ClassAlignment]:
    """Measure the alignment of two views of each image.

    Args:
        first: Features of a view of each image (N, D), of any scale.
        second: Features of another view of each image (N, D).
        label: Class of each image (N,), 0 or 1.

    Returns:
        The alignment of both classes. NaN for a class without images.
    """
    features = F.normalize(torch.cat([first, second]).float(), dim=1)
    label, num_images = torch.cat([label, label]), len(first)
    similarity = (features @ features.T).fill_diagonal_(float('-inf'))
    row = torch.arange(len(features), device=label.device)
    finds_itself = similarity.argmax(dim=1) == (row + num_images) % len(features)
    found = []
    for index in (0, 1):
        own = label == index
        count = max(1, min(int(NEIGHBOURHOOD * len(features)), int(own.sum()) - 1))
        if not own.any():
            found.append(ClassAlignment(float('nan'), float('nan')))
            continue
        nearest = similarity[own].topk(count, dim=1).indices
        same = (label[nearest] == index).float().mean()
        found.append(ClassAlignment(100 * finds_itself[own].float().mean().item(), 100 * same.item()))
    return found


def describe_alignment(found: Sequence[ClassAlignment], names: Sequence[str]) -> str:
    """Describe the alignment of both classes as a part of a line."""
    return '; '.join(
        f'{name}: SAA {of_class.saa:.1f} %, CAC {of_class.cac:.1f} %'
        for name, of_class in zip(names, found, strict=True)
    )


def find_collapse(
    before: Optional[Sequence[ClassAlignment]], after: Sequence[ClassAlignment], names: Sequence[str]
) -> List[str]:
    """Sentences about what got lost in training, none if nothing did.

    Args:
        before: Alignment of both classes before the training, None if it is not known.
        after: The same after it.
        names: Names of the classes.
    """
    told = []
    for index, name in enumerate(names):
        if before is not None and after[index].saa < 0.5 * before[index].saa:
            told.append(
                f'Images of the class {name!r} are hardly told from each other any more: SAA was '
                f'{before[index].saa:.1f} % and is {after[index].saa:.1f} %.'
            )
        if after[index].cac < 50:
            told.append(
                f'Images that are near to those of the class {name!r} are mostly of the class {names[1 - index]!r}: '
                f'CAC is {after[index].cac:.1f} %.'
            )
    return told
