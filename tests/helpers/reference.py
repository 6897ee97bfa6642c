"""Core-tuning as nested loops in float64: what the package must agree with, written from the formulas alone

Nothing here calls the package. All 3B rows are built, classified and projected explicitly.
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from sklearn.metrics.pairwise import cosine_similarity

Affine = Tuple[np.ndarray, np.ndarray]


class Mined(NamedTuple):
    """Of one anchor: row of its hardest positive, of its hardest negative (None: there is none), of all negatives."""

    hardest_positive: int
    hardest_negative: Optional[int]
    negatives: List[int]


class Mixtures(NamedTuple):
    """Mixed rows of all anchors; negative is None when the batch holds one class only."""

    positive: List[np.ndarray]
    negative: Optional[List[np.ndarray]]


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy() if x.is_floating_point() else x.numpy()


def classes(target: torch.Tensor) -> List[int]:
    """Class of every row; of soft targets the most probable one, of equally probable ones the first."""
    if target.ndim == 1:
        return [int(y) for y in target]
    return [max(range(len(row)), key=lambda c: (row[c], -c)) for row in array(target).tolist()]


def soft_target(target: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> List[np.ndarray]:
    if target.ndim == 2:
        return list(array(target))
    rows = [np.full(num_classes, smoothing / num_classes) for _ in target]
    for row, y in zip(rows, classes(target), strict=True):
        row[y] += 1.0 - smoothing
    return rows


def similarity(features: torch.Tensor) -> np.ndarray:
    """Cosine of every pair of rows (B, B); with a row of zeros it is 0."""
    return cosine_similarity(array(features))


def mine(
    features: torch.Tensor, target: torch.Tensor, candidates: Optional[Sequence[Sequence[float]]] = None
) -> List[Mined]:
    """With candidates, numbers in [0, 1) of each anchor, the hardest positive is that of the positives they choose."""
    s, y = similarity(features), classes(target)
    mined = []
    for i in range(len(y)):
        positives = [j for j in range(len(y)) if j != i and y[j] == y[i]]
        if candidates is not None and positives:
            # the product of two numbers in float32, as drawn
            positives = [positives[int(np.float32(u) * np.float32(len(positives)))] for u in candidates[i]]
        negatives = [j for j in range(len(y)) if y[j] != y[i]]
        mined.append(
            Mined(
                hardest_positive=min(positives, key=lambda j, i=i: s[i][j]) if positives else i,
                hardest_negative=max(negatives, key=lambda j, i=i: s[i][j]) if negatives else None,
                negatives=negatives,
            )
        )
    return mined


def mixtures(
    x: Sequence[np.ndarray],
    mined: List[Mined],
    random_negative: Sequence[int],
    a: Sequence[float],
    b: Sequence[float],
) -> Mixtures:
    """x_i+ = a x_hp + (1 - a) x_hn and x_i- = (1 - b) x_i + b x_rn."""
    positive, negative = [], []
    for i, (hp, hn, negatives) in enumerate(mined):
        if hn is None:
            positive.append(x[hp])
            continue
        if random_negative[i] not in negatives:
            raise AssertionError(f'row {random_negative[i]} is no negative of row {i}, those are {negatives}')
        positive.append(a[i] * x[hp] + (1.0 - a[i]) * x[hn])
        negative.append((1.0 - b[i]) * x[i] + b[i] * x[random_negative[i]])
    return Mixtures(positive, negative or None)


def log_softmax(row: Sequence[float]) -> List[float]:
    largest = max(row)
    log_sum = largest + math.log(sum(math.exp(x - largest) for x in row))
    return [x - log_sum for x in row]


def unit(row: np.ndarray) -> np.ndarray:
    length = math.sqrt(sum(x * x for x in row.tolist()))
    return row / length if length != 0.0 else row


def focal_contrast(
    embedding: Sequence[np.ndarray],
    y: Sequence[int],
    extra_positive: Optional[Sequence[np.ndarray]] = None,
    extra_negative: Optional[Sequence[np.ndarray]] = None,
    temperature: float = 0.07,
    focal: bool = True,
) -> float:
    """- 1/B sum_i 1/|P_i| sum over P_i of (1 - p_ij) log p_ij; an anchor without positives counts 0."""
    v = [unit(row) for row in embedding]
    total = 0.0
    for i in range(len(v)):
        pairs = [(float(v[i] @ v[j]), y[j] == y[i]) for j in range(len(v)) if j != i]
        if extra_positive is not None:
            pairs.append((float(v[i] @ unit(extra_positive[i])), True))
        if extra_negative is not None:
            pairs.append((float(v[i] @ unit(extra_negative[i])), False))
        if not any(is_positive for _, is_positive in pairs):
            continue
        log_p = log_softmax([cosine / temperature for cosine, _ in pairs])
        of_positives = [lp for lp, (_, is_positive) in zip(log_p, pairs, strict=True) if is_positive]
        total += sum((math.expm1(lp) if focal else -1.0) * lp for lp in of_positives) / len(of_positives)
    return total / len(v)


def cross_entropy(logits: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> float:
    """Soft-target cross-entropy, mean over the rows."""
    total = 0.0
    for row, t in zip(logits, target, strict=True):
        total -= sum(share * lp for share, lp in zip(t.tolist(), log_softmax(row.tolist()), strict=True))
    return total / len(logits)


def affine(rows: Sequence[np.ndarray], layer: Affine) -> List[np.ndarray]:
    weight, bias = layer
    return [weight @ row + bias for row in rows]


def classify(rows: Sequence[np.ndarray], classifier: Union[Affine, Tuple[Affine, Affine]]) -> List[np.ndarray]:
    """Logits of rows, by an affine layer or by two with tanh in between."""
    if isinstance(classifier[0], tuple):
        first, classifier = classifier
        rows = [np.array([math.tanh(x) for x in row.tolist()]) for row in affine(rows, first)]
    return affine(rows, classifier)


def layer_of(linear: torch.nn.Linear) -> Affine:
    return array(linear.weight), array(linear.bias)


def objective(
    features: torch.Tensor,
    target: torch.Tensor,
    classifier: Union[Affine, Tuple[Affine, Affine]],
    projector: Optional[Tuple[Affine, Affine]],
    random_negative: Optional[Sequence[int]] = None,
    a: Optional[Sequence[float]] = None,
    b: Optional[Sequence[float]] = None,
    contrast_weight: float = 0.1,
    temperature: float = 0.07,
    focal: bool = True,
    label_smoothing: float = 0.0,
    candidates: Optional[Sequence[Sequence[float]]] = None,
    smooth: Sequence[str] = ('positive', 'negative'),
    smooth_weight: Optional[float] = None,
    contrasted: Sequence[str] = ('positive', 'negative'),
) -> Dict[str, float]:
    """The losses of a batch. Without random_negative, a and b there are no mixtures, without projector no contrast.

    smooth names the mixtures of the cross-entropy, contrasted those of the contrast.
    """
    f, y = list(array(features)), classes(target)
    output = classifier[1] if isinstance(classifier[0], tuple) else classifier
    t = soft_target(target, len(output[1]), label_smoothing)
    rows, targets, mixed = [], [], Mixtures(None, None)
    if a is not None:
        mined = mine(features, target, candidates)
        mixed = mixtures(f, mined, random_negative, a, b)
        mixed_target = mixtures(t, mined, random_negative, a, b)
        for name in smooth:
            rows += getattr(mixed, name) or []
            targets += getattr(mixed_target, name) or []
        mixed = Mixtures(*(part if name in contrasted else None for name, part in mixed._asdict().items()))
    if smooth_weight is None:
        task_loss = cross_entropy(classify(f + rows, classifier), t + targets)
    else:
        task_loss = cross_entropy(classify(f, classifier), t)
        task_loss += smooth_weight * cross_entropy(classify(rows, classifier), targets) if rows else 0.0
    if projector is None:
        return {'loss': task_loss, 'task_loss': task_loss}

    def project(x: Optional[Sequence[np.ndarray]]) -> Optional[List[np.ndarray]]:
        if x is None:
            return None
        return affine([np.maximum(hidden, 0.0) for hidden in affine(x, projector[0])], projector[1])

    contrast_loss = focal_contrast(
        project(f), y, project(mixed.positive), project(mixed.negative), temperature=temperature, focal=focal
    )
    return {
        'loss': task_loss + contrast_weight * contrast_loss,
        'task_loss': task_loss,
        'contrast_loss': contrast_loss,
    }


# Batches to compare on


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_label(seed: int, batch_size: int, num_classes: int, imbalance: float = 0.0) -> torch.Tensor:
    """Class indices (B,) int64, class c with a frequency in proportion to (1 + c) ** -imbalance."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.arange(1, num_classes + 1, dtype=torch.float64) ** -imbalance
    return torch.multinomial(frequency, batch_size, replacement=True, generator=generator)


def random_soft_target(seed: int, batch_size: int, num_classes: int) -> torch.Tensor:
    """Rows that sum to one (B, C) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_classes, dtype=torch.float64, generator=generator).mul(2).softmax(dim=-1)


def random_features(seed: int, batch_size: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Features of any sign and of very different length (B, D)."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(batch_size, width, dtype=torch.float64, generator=generator)
    return (direction * torch.rand(batch_size, 1, dtype=torch.float64, generator=generator).mul(4).exp()).to(dtype)
