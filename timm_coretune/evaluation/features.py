"""Figures of features themselves: accuracy of their nearest neighbours, RankMe, and the spread of classes

RankMe is from Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
Representations by Their Rank", ICML 2023. The vote of the neighbours is that of Wu et al., "Unsupervised Feature
Learning via Non-Parametric Instance Discrimination", CVPR 2018.
"""

import math
from typing import Dict, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F

from ..checks import check_features, check_target

KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07
_BLOCK_ELEMENTS = 2**24  # similarities that are held at once, 64 MiB


def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    num_classes: int,
    k: int = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Classify features by the labels of their nearest neighbours.

    Neighbours are those of highest cosine similarity s, and the vote of each weighs exp(s / temperature). Of equally
    similar features the one with the lower index comes first, and of classes with equal votes the lower one wins.

    Args:
        queries: Features to classify (N, D).
        bank: Features that vote (M, D).
        bank_labels: Their classes (M,), integers in [0, num_classes).
        num_classes: Number of classes.
        k: Number of neighbours that vote, M at most.
        temperature: The lower it is, the more the nearest neighbours count.

    Returns:
        Predicted classes (N,), and the rows of the bank that voted (N, k), nearest first.

    Raises:
        ValueError: A shape, a type, a class, k or the temperature does not fit, or a feature is not finite.
    """
    _check_finite(queries, 'queries')
    _check_labelled(bank, bank_labels, 'bank', num_classes)
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f'Expected queries as wide as the bank, got {tuple(queries.shape)} and {tuple(bank.shape)}. Compute both '
            'with the same model.'
        )
    if not 0 < k <= len(bank):
        raise ValueError(f'Expected k of 1 to {len(bank)}, the size of the bank, got {k}.')
    if not temperature > 0:
        raise ValueError(f'Expected a temperature above 0, got {temperature}.')
    bank, bank_labels = F.normalize(bank.float(), dim=1), bank_labels.long()
    predictions, neighbours = [], []
    for block in queries.split(max(1, _BLOCK_ELEMENTS // len(bank))):
        similarity = F.normalize(block.float(), dim=1) @ bank.T
        nearest, indices = _first_highest(similarity, k)
        votes = similarity.new_zeros(len(block), num_classes)
        # a common factor of all votes of a query keeps them finite at any temperature
        votes.scatter_add_(1, bank_labels[indices], ((nearest - nearest[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
        neighbours.append(indices)
    return torch.cat(predictions), torch.cat(neighbours)


def _first_highest(values: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k highest values of each row (N, k) and their columns. Of equal ones the first, unlike topk."""
    least = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > least, values == least
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    columns = chosen.nonzero()[:, 1].view(-1, k)
    highest, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return highest, columns.gather(1, order)


def rank_me(features: torch.Tensor) -> float:
    """Effective rank of features (N, D): exp(-sum_i p_i ln p_i) of singular values s, with p_i = s_i / sum_j s_j.

    It lies between 1, all features on one line, and min(N, D), all singular values equal. The published one adds 1e-7
    to each p_i. Features are neither centred nor normalised. Compare ranks of the same number of features only.

    Raises:
        ValueError: The shape or type does not fit, a feature is not finite, or all are 0.
    """
    _check_finite(features, 'features')
    rows = features.double() if len(features) < features.shape[1] else features.double().T
    # in float64 as good as a singular value decomposition, and four times as fast for 2,048 features of that width
    singular_values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0).sqrt()
    if not singular_values[-1] > 0:
        raise ValueError('Expected features that are not all 0. Check the model: its outputs have collapsed.')
    share = singular_values / singular_values.sum()
    return torch.special.entr(share).sum().exp().item()


def class_scatter(features: torch.Tensor, labels: torch.Tensor) -> Tuple[float, float]:
    """Spread of features (N, D) within and between classes (N,), after each feature was divided by its L2 norm.

    With z_i the features of length 1, m_c the mean of those of class c, and C the number of classes that have features:

    - within = 1/N sum_i ||z_i - m_c(i)||^2, between 0 and 1
    - between = 2 / (C (C - 1)) sum_{c < d} ||m_c - m_d||^2, the mean over pairs of classes, between 0 and 4. NaN if all
      features are of one class

    Returns:
        within and between.

    Raises:
        ValueError: A shape, a type or a label does not fit, or a feature is not finite.
    """
    _check_labelled(features, labels, 'features')
    features = F.normalize(features.double(), dim=1)
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    means = features.new_zeros(len(classes), features.shape[1]).index_add_(0, index, features) / counts[:, None]
    within = (features - means[index]).square().sum(dim=1).mean().item()
    if len(classes) < 2:
        return within, math.nan
    # the sum over all pairs is C times that of the squared distances to the mean of the means
    between = 2 / (len(classes) - 1) * (means - means.mean(dim=0)).square().sum().item()
    return within, between


def measure_features(
    features: torch.Tensor, labels: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor
) -> Dict[str, float]:
    """Measure features of images that were held out.

    Args:
        features: Features of these images (N, D).
        labels: Their classes (N,).
        bank: Features of other images (M, D), which vote in kNN.
        bank_labels: Their classes (M,).

    Returns:
        `knn_top1`, in per cent, of at most KNN_NEIGHBOURS neighbours in the bank, and `rank_me`, `within_class` and
        `between_class` of the features that were held out. All are NaN if a feature is not finite.

    Raises:
        ValueError: A shape, a type or a label does not fit.
    """
    if not (features.isfinite().all() and bank.isfinite().all()):
        return dict.fromkeys(('knn_top1', 'rank_me', 'within_class', 'between_class'), math.nan)
    _check_labelled(features, labels, 'features')
    _check_labelled(bank, bank_labels, 'bank')
    num_classes = int(bank_labels.max()) + 1
    predictions, _ = knn_predict(features, bank, bank_labels, num_classes, min(KNN_NEIGHBOURS, len(bank)))
    within, between = class_scatter(features, labels)
    return {
        'knn_top1': 100 * (predictions == labels).double().mean().item(),
        'rank_me': rank_me(features),
        'within_class': within,
        'between_class': between,
    }


def describe_features(figures: Mapping[str, float]) -> str:
    """Write what `measure_features` returned as a part of a log line."""
    return (
        f'kNN: {figures["knn_top1"]:.2f} %  RankMe: {figures["rank_me"]:.2f}  '
        f'within classes: {figures["within_class"]:.4f}  between classes: {figures["between_class"]:.4f}'
    )


def _check_finite(features: torch.Tensor, name: str) -> None:
    check_features(features, name)
    if not features.isfinite().all():
        raise ValueError(f'Expected finite {name}, got NaN or infinity. Check the weights of the model.')


def _check_labelled(features: torch.Tensor, labels: torch.Tensor, name: str, num_classes: Optional[int] = None) -> None:
    _check_finite(features, name)
    if labels.ndim != 1:
        raise ValueError(f'Expected one class for each row of {name}, ({len(features)},), got {tuple(labels.shape)}.')
    check_target(labels, len(features), num_classes)
