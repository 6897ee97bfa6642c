"""DR-Tune without its rotation, as loops in float64, written from the formulas alone"""

import math


def log_softmax(row):
    highest = max(row)
    return [x - highest - math.log(sum(math.exp(y - highest) for y in row)) for x in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cross_entropy(logits, label, smoothing=0.0):
    log_p = log_softmax(logits)
    return -(1 - smoothing) * log_p[label] - smoothing * sum(log_p) / len(log_p)


def expected(logits, target, bank, matrix, bias, weight=None, smoothing=0.0):
    """Losses of a batch.

    Args:
        logits: Logits of the batch, a list of rows.
        target: Their classes.
        bank: (pretrained features, tuned features, class) of the last K images, this batch included.
        matrix: Weights of the classifier, a row for each class.
        bias: Its bias.
        weight: Weight of the bank; None for that of the paper.
        smoothing: Label smoothing.
    """
    task_loss = sum(cross_entropy(row, y, smoothing) for row, y in zip(logits, target, strict=True)) / len(target)
    width = len(matrix[0])
    shift = {}
    for c in {y for _, _, y in bank}:
        members = [(p, d) for p, d, y in bank if y == c]
        share = [math.exp(log_p) for log_p in log_softmax([dot(matrix[c], d) for _, d in members])]
        shift[c] = [
            sum(a * d[i] for a, (_, d) in zip(share, members, strict=True))
            - sum(p[i] for p, _ in members) / len(members)
            for i in range(width)
        ]
    bank_losses = []
    for p, _, y in bank:
        moved = [a + b for a, b in zip(p, shift[y], strict=True)]
        bank_losses.append(cross_entropy([dot(w, moved) + b for w, b in zip(matrix, bias, strict=True)], y, smoothing))
    bank_loss = sum(bank_losses) / len(bank_losses)
    weight = len(bank) / len(target) if weight is None else weight
    return {'loss': task_loss + weight * bank_loss, 'task_loss': task_loss, 'bank_loss': bank_loss}
