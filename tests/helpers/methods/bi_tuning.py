import numpy as np
from reference import affine, array, classes, layer_of, log_softmax, unit

from methods import clean_cross_entropy, features_with


def mean_nll(similarity, is_positive, temperature):
    log_p = log_softmax([float(s) / temperature for s in similarity])
    chosen = [-x for x, positive in zip(log_p, is_positive, strict=True) if positive]
    return sum(chosen) / len(chosen) if chosen else 0.0


def with_one(row):
    return unit(np.append(row, 1.0))


def losses(step, queue):
    """queue: features with a one behind, and projection, of unit length, and class, of all keys, this batch too."""
    task_loss, criterion = clean_cross_entropy(step), step.criterion
    weight, bias = layer_of(step.model.get_classifier())
    features = list(array(step.features))
    prototype_loss = instance_loss = 0.0
    for f, z, y in zip(features, affine(features, layer_of(criterion.projector)), classes(step.target), strict=True):
        is_positive = [label == y for _, _, label in queue]
        prototype = unit(np.append(weight[y], bias[y]))
        similarity = [prototype @ with_one(f), *(prototype @ key for key, _, _ in queue)]
        prototype_loss += mean_nll(similarity, [True, *is_positive], criterion.temperature)
        instance_loss += mean_nll([unit(z) @ key for _, key, _ in queue], is_positive, criterion.temperature)
    prototype_loss, instance_loss = prototype_loss / len(features), instance_loss / len(features)
    return {
        'loss': task_loss + criterion.contrast_weight * (prototype_loss + instance_loss),
        'task_loss': task_loss,
        'prototype_loss': prototype_loss,
        'instance_loss': instance_loss,
    }


def keys_of(features, projector, label):
    """Keys from the features of the momentum encoder."""
    rows = list(array(features))
    projections = affine(rows, layer_of(projector))
    return [(with_one(f), unit(z), y) for f, z, y in zip(rows, projections, label, strict=True)]


def expected(step):
    encoder, queue = step.criterion.encoder, step.criterion.queue
    rows = zip(array(queue.feature), array(queue.projection), queue.label.tolist(), strict=True)
    features = features_with(step, dict(encoder.model.named_parameters()))
    batch = keys_of(features, encoder.projector, classes(step.target))
    return losses(step, [row for row in [*rows, *batch] if row[2] >= 0])
