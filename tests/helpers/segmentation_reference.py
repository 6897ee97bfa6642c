"""Core-tuning of pixels as nested loops: which pixels are anchors, and the losses of a batch

The losses are put together of the formulas in reference.py. Of the package only the values of draw_noise are used, by
which ties between pixels are decided.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from reference import Affine, affine, array, cross_entropy, focal_contrast, log_softmax, mine, mixtures, soft_target

from timm_coretune.segmentation.anchors import draw_noise

IGNORED = 255


class Choice(NamedTuple):
    """An anchor: in which turn of its class it is taken, what decides within a turn, and its pixel."""

    turn: int
    noise: int
    pixel: int


def anchors_of_image(label: Sequence[int], hard: Sequence[bool], noise: Sequence[int], num_anchors: int) -> List[int]:
    """Pixels of one image in the order in which they are taken."""
    choices = []
    for c in sorted({y for y in label if y >= 0}):
        kinds = {True: [], False: []}
        for pixel, y in enumerate(label):
            if y == c:
                kinds[hard[pixel]].append((noise[pixel], pixel))
        waiting = [sorted(kinds[True]), sorted(kinds[False])]
        turn, kind = 0, 0
        while waiting[0] or waiting[1]:
            if not waiting[kind]:
                kind = 1 - kind
            choices.append(Choice(turn, *waiting[kind].pop(0)))
            turn, kind = turn + 1, 1 - kind
    return [choice.pixel for choice in sorted(choices)[:num_anchors]]


def anchors_of_batch(label: torch.Tensor, hard: torch.Tensor, seed: torch.Tensor, num_anchors: int) -> List[List[int]]:
    noise = draw_noise(seed, label.shape[1]).tolist()
    rows = zip(label.tolist(), hard.tolist(), noise, strict=True)
    return [anchors_of_image(*row, num_anchors) for row in rows]


def dense_cross_entropy(output: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> float:
    """Mean over the pixels that count, 0 where there is none."""
    total, num_pixels = 0.0, 0
    num_classes = output.shape[1]
    for rows, labels in zip(array(output).transpose(0, 2, 3, 1).tolist(), target.tolist(), strict=True):
        for row, label in zip(sum(rows, []), sum(labels, []), strict=True):
            if label == IGNORED:
                continue
            log_p = log_softmax(row)
            total -= (1.0 - smoothing) * log_p[label] + smoothing * sum(log_p) / num_classes
            num_pixels += 1
    return total / num_pixels if num_pixels else 0.0


def label_in_the_middle(mask: List[List[int]], height: int, width: int) -> List[int]:
    """Class of the pixel that holds the middle of each cell, row by row."""
    rows, columns = len(mask), len(mask[0])
    labels = []
    for i in range(height):
        for j in range(width):
            labels.append(mask[(2 * i + 1) * rows // (2 * height)][(2 * j + 1) * columns // (2 * width)])
    return labels


class Pixels(NamedTuple):
    """What a model makes of a batch: features (B, D, h, w) and logits (B, C, h, w) of the padded images, logits of the
    images (B, C, H, W); and the masks of the padded images (B, H', W').
    """

    features: torch.Tensor
    logits: torch.Tensor
    output: torch.Tensor
    padded: torch.Tensor


class Draws(NamedTuple):
    """Random numbers of a step: seeds of the images (B,), and of their anchors' mixtures each (B * A,)."""

    seed: torch.Tensor
    positive_lam: torch.Tensor
    negative_lam: torch.Tensor
    random_negative: torch.Tensor
    positive_candidates: torch.Tensor


def pixel_objective(
    pixels: Pixels,
    target: torch.Tensor,
    classifier: Optional[Affine],
    projector: Optional[Tuple[Affine, Affine]],
    draws: Draws,
    num_anchors: int,
    mixup_enabled: bool = True,
    contrast_weight: float = 0.1,
    temperature: float = 0.07,
    label_smoothing: float = 0.0,
    smooth: str = 'both',
    smooth_weight: Optional[float] = None,
) -> Dict[str, float]:
    """The losses of a batch, with mixtures of anchors that are built and classified one by one.

    Without a classifier the logits of a mixture are those of its two pixels, mixed.

    smooth names the mixtures of the cross-entropy. Their mean has the weight smooth_weight; None is the mean of all.
    """
    height, width = pixels.features.shape[2:]
    cells = [label_in_the_middle(mask, height, width) for mask in pixels.padded.tolist()]
    label = torch.tensor([[-1 if y == IGNORED else y for y in row] for row in cells])
    hard = []
    for image, row in zip(array(pixels.logits), cells, strict=True):
        flat = image.reshape(len(image), -1)
        hard.append([int(np.argmax(flat[:, p])) != y for p, y in enumerate(row)])
    f, o, y, a, b, uniform = [], [], [], [], [], []
    for image, chosen in enumerate(anchors_of_batch(label, torch.tensor(hard), draws.seed, num_anchors)):
        flat = array(pixels.features)[image].reshape(pixels.features.shape[1], -1)
        for place, p in enumerate(chosen):
            f.append(flat[:, p])
            o.append(array(pixels.logits)[image].reshape(pixels.logits.shape[1], -1)[:, p])
            y.append(int(label[image, p]))
            row = image * num_anchors + place
            a.append(float(draws.positive_lam[row]))
            b.append(float(draws.negative_lam[row]))
            uniform.append(draws.random_negative[row].numpy())
    dense = dense_cross_entropy(pixels.output, target, label_smoothing)
    parts, positive, negative = [dense], None, None
    if mixup_enabled and f:
        features, classes = torch.from_numpy(np.stack(f)), torch.tensor(y)
        mined = mine(features, classes)
        random_negative = []
        for own, x in zip(y, uniform, strict=True):
            others = [j for _, j in sorted((y[j], j) for j in range(len(y)) if y[j] != own)]
            random_negative.append(others[int(x * np.float32(len(others)))] if others else None)
        t = soft_target(classes, pixels.logits.shape[1], label_smoothing)
        positive, negative = mixtures(f, mined, random_negative, a, b)
        positive_target, negative_target = mixtures(t, mined, random_negative, a, b)
        mixed = mixtures(o, mined, random_negative, a, b)
        if classifier is not None:
            mixed = [part and affine(part, classifier) for part in (positive, negative)]
        if smooth == 'both':
            parts.append(cross_entropy(mixed[0], positive_target))
        if negative is not None:
            parts.append(cross_entropy(mixed[1], negative_target))
    task_loss = sum(parts) / len(parts)
    if smooth_weight is not None:
        task_loss = dense + smooth_weight * sum(parts[1:]) / max(len(parts) - 1, 1)
    losses = {'loss': task_loss, 'task_loss': task_loss, 'dense_loss': dense}
    if projector is None:
        return losses

    def project(x: Optional[Sequence[np.ndarray]]) -> Optional[List[np.ndarray]]:
        if x is None:
            return None
        return affine([np.maximum(hidden, 0.0) for hidden in affine(x, projector[0])], projector[1])

    contrast_loss = 0.0
    if f:
        contrast_loss = focal_contrast(project(f), y, project(positive), project(negative), temperature=temperature)
    return {**losses, 'loss': task_loss + contrast_weight * contrast_loss, 'contrast_loss': contrast_loss}
