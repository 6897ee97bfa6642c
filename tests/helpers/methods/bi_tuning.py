"""Bi-tuning as loops in float64, written from the formulas alone"""

from methods.dr_tune import cross_entropy, dot, log_softmax
from methods.ldifs import unit


def mean_nll(similarities, is_positive, temperature):
    log_p = log_softmax([s / temperature for s in similarities])
    chosen = [-x for x, positive in zip(log_p, is_positive, strict=True) if positive]
    return sum(chosen) / len(chosen) if chosen else 0.0


def expected(features, logits, target, projections, queue, matrix, bias, weight=1.0, temperature=0.07, smoothing=0.0):
    """Losses of a batch.

    Args:
        features: Features of the batch, a list of rows.
        logits: Their logits.
        target: Their classes.
        projections: Their projections, of any length.
        queue: (features, projection, class) of the last keys of each class, this batch included.
        matrix: Weights of the classifier, a row for each class.
        bias: Its bias.
        weight: Weight of the contrasts.
        temperature: Divides cosines.
        smoothing: Label smoothing.
    """
    task_loss = sum(cross_entropy(row, y, smoothing) for row, y in zip(logits, target, strict=True)) / len(target)
    keys = [(unit([*f, 1.0]), unit(z), y) for f, z, y in queue]
    prototype_losses, instance_losses = [], []
    for f, z, y in zip(features, projections, target, strict=True):
        prototype = unit([*matrix[y], bias[y]])
        similarities = [dot(prototype, unit([*f, 1.0])), *(dot(prototype, key) for key, _, _ in keys)]
        is_positive = [True, *(label == y for _, _, label in keys)]
        prototype_losses.append(mean_nll(similarities, is_positive, temperature))
        similarities = [dot(unit(z), key) for _, key, _ in keys]
        instance_losses.append(mean_nll(similarities, is_positive[1:], temperature))
    prototype_loss = sum(prototype_losses) / len(target)
    instance_loss = sum(instance_losses) / len(target)
    return {
        'loss': task_loss + weight * (prototype_loss + instance_loss),
        'task_loss': task_loss,
        'prototype_loss': prototype_loss,
        'instance_loss': instance_loss,
    }
