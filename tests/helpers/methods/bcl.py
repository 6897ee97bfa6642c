import math

from reference import classes

from methods import clean_cross_entropy
from methods.contrast import embeddings


def contrast(z, y, temperature):
    total = 0.0
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and y[j] == y[i]]
        if not positives:
            continue
        similarity = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(len(z))]
        means = []
        for c in set(y):
            members = [similarity[k] for k in range(len(z)) if k != i and y[k] == c]
            if members:
                means.append(sum(members) / len(members))
        total -= sum(math.log(similarity[p] / sum(means)) for p in positives) / len(positives)
    return total / len(z)


def expected(step):
    criterion, task_loss = step.criterion, clean_cross_entropy(step)
    contrast_loss = contrast(embeddings(step), classes(step.target), criterion.temperature)
    loss = task_loss + criterion.contrast_weight * contrast_loss
    return {'loss': loss, 'task_loss': task_loss, 'contrast_loss': contrast_loss}
