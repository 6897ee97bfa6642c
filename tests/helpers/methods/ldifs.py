"""LDIFS as loops in float64, written from the formula alone"""

import math

from methods.dr_tune import cross_entropy


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def expected(logits, target, layers, weight=10.0, smoothing=0.0):
    """Losses of a batch.

    Args:
        logits: Logits of the batch, a list of rows.
        target: Their classes.
        layers: For each layer the features of the tuned and of the pretrained model, each a list of rows.
        weight: Weight of the distance.
        smoothing: Label smoothing.
    """
    task_loss = sum(cross_entropy(row, y, smoothing) for row, y in zip(logits, target, strict=True)) / len(target)
    total = 0.0
    for tuned, pretrained in layers:
        for a, b in zip(tuned, pretrained, strict=True):
            total += sum((x - y) ** 2 for x, y in zip(unit(a), unit(b), strict=True))
    distance_loss = total / len(layers) / len(target)
    return {'loss': task_loss + weight * distance_loss, 'task_loss': task_loss, 'distance_loss': distance_loss}
