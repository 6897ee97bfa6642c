"""Core-tuning of images with several labels, by plain loops over images in float64"""

import copy
import math

import torch


def jaccard(a, b):
    """Jaccard index of two rows of 0 and 1, by Python's sets."""
    a, b = ({c for c, x in enumerate(row.tolist()) if x} for row in (a, b))
    return len(a & b) / len(a | b) if a | b else 0.0


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def find_pairs(features, labels, draws):
    """Hard positive, hard negative and random negative of each image, which is itself where there is none."""
    pairs = []
    by_label = sorted(range(len(labels)), key=lambda j: int(labels[j].argmax()))
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        near = {j: cosine(features[i], features[j]) for j in others}
        positives = [j for j in others if jaccard(labels[i], labels[j]) > 0]
        negatives = [j for j in by_label if j != i and jaccard(labels[i], labels[j]) == 0]
        pairs.append(
            (
                min(positives, key=near.__getitem__) if positives else i,
                max(negatives, key=near.__getitem__) if negatives else i,
                negatives[int(float(draws[i]) * len(negatives))] if negatives else i,
                bool(negatives),
            )
        )
    return pairs


def bce(logit_rows, target_rows):
    """Mean binary cross-entropy over rows and classes."""
    total, count = 0.0, 0
    for logits, target in zip(logit_rows, target_rows, strict=True):
        for x, t in zip(logits.tolist(), target.tolist(), strict=True):
            p = 1 / (1 + math.exp(-x))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
            count += 1
    return total / count


def contrast(anchor, labels, units, i, temperature, positive=None, negative=None, positive_weight=0.0, focal=True):
    """Loss of one anchor."""
    candidates = [(units[j], jaccard(labels[i], labels[j])) for j in range(len(labels)) if j != i]
    if positive is not None:
        candidates.append((positive, positive_weight))
    if negative is not None:
        candidates.append((negative, 0.0))
    scores = [math.exp(float(anchor @ v) / temperature) for v, _ in candidates]
    weights = [w for _, w in candidates]
    if not sum(weights):
        return 0.0
    ps = [score / sum(scores) for score in scores]
    return -sum(w / sum(weights) * ((1 - p) if focal else 1) * math.log(p) for p, w in zip(ps, weights, strict=True))


def core_losses(loss, features, logits, target, draws):
    """Task loss and contrastive loss of Core-tuning. Draws are those of the batch, `loss` gives its projection head."""
    labels = (target >= 0.5).double()
    pairs = find_pairs(features, labels, draws.random_negative)

    def mix(x, part):
        rows = []
        for i, (hp, hn, rn, has_negative) in enumerate(pairs):
            lam = float(draws.positive_lam[i] if part == 'positive' else draws.negative_lam[i])
            if part == 'positive':
                rows.append(lam * x[hp] + (1 - lam) * x[hn] if has_negative else x[hp])
            else:
                rows.append(lam * x[rn] + (1 - lam) * x[i])
        return torch.stack(rows)

    some_negative = any(has for *_, has in pairs)
    parts = ['positive', 'negative'] if some_negative else ['positive']
    task = (bce(logits, target) + sum(bce(mix(logits, p), mix(target, p)) for p in parts)) / (1 + len(parts))

    def embed(x):
        x = loss.projector.fc2(loss.projector.fc1(x).clamp(min=0))
        return x / x.norm(dim=1, keepdim=True)

    loss = copy.deepcopy(loss).requires_grad_(False)
    units, positive, negative = embed(features), embed(mix(features, 'positive')), embed(mix(features, 'negative'))
    total = sum(
        contrast(
            units[i],
            labels,
            units,
            i,
            loss.contrast.temperature,
            positive[i],
            negative[i] if pairs[i][3] else None,
            jaccard(labels[i], labels[pairs[i][0]]),
        )
        for i in range(len(labels))
    )
    return task, total / len(labels)
