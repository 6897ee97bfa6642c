"""What the counts of the classes tell of the positives in a contrasted batch, and what to do where there are few"""

import math
from typing import List, Optional, Sequence, Tuple

import numpy as np

from .class_balance import expected_positives

FEW = 0.1  # share of images without a positive, although there is one, from which on something is to be done


def share_of_batches_without(counts: Sequence[int], batch_size: int) -> float:
    """Probability that a randomly drawn batch has no two images of a class, so that no image has a positive.

    With n_c images of class c it is e_B(n_1, ..., n_C) / binom(N, B), where e_B is the sum over all choices of B
    classes of the product of their counts. The batch is drawn without replacement.

    Args:
        counts: Number of images of each class.
        batch_size: Number B of images in a batch, over all processes.
    """
    counts = [count for count in counts if count]
    drawn = min(batch_size, sum(counts))
    if drawn > len(counts):
        return 0.0
    # logarithm of e_k of the classes so far, for k from 0 to B
    log_sums = np.full(drawn + 1, -np.inf)
    log_sums[0] = 0.0
    for count in counts:
        log_sums[1:] = np.logaddexp(log_sums[1:], log_sums[:-1] + math.log(count))
    total = sum(counts)
    log_choices = math.lgamma(total + 1) - math.lgamma(drawn + 1) - math.lgamma(total - drawn + 1)
    return min(1.0, math.exp(log_sums[drawn] - log_choices))


def _share_without_company(counts: Sequence[int], batch_size: int) -> float:
    """Share of the images that find no positive in a batch, although there is another image of their class."""
    single = sum(count == 1 for count in counts) / sum(counts)
    return max(0.0, expected_positives(counts, batch_size)[1] - single)


def _sufficient_batch(counts: Sequence[int], batch_size: int) -> Optional[int]:
    """The batch size, doubled as often as needed, with which few images find no positive. None above the data."""
    while 2 * batch_size <= sum(counts):
        batch_size *= 2
        if _share_without_company(counts, batch_size) <= FEW:
            return batch_size
    return None


def describe_positives(
    counts: Sequence[int], batch_size: int, is_balanced: bool, has_mixtures: bool
) -> Tuple[str, List[str]]:
    """Describe what an image finds in a batch of a contrastive loss.

    Args:
        counts: Number of images of each class.
        batch_size: Number of images that are contrasted together.
        is_balanced: Whether a class in a batch is there at least twice, as with --class-balance.
        has_mixtures: Whether each image has a mixture of its class as a positive, too.

    Returns:
        A sentence or more for the log, and warnings with what to do.
    """
    single, total = sum(count == 1 for count in counts), sum(counts)
    if is_balanced:
        told = f'A class in a batch is there at least twice; {100 * single / total:.1f} % of the images have no other.'
    else:
        positives, alone = expected_positives(counts, batch_size)
        without = share_of_batches_without(counts, batch_size)
        mixture = ' but their mixture' if has_mixtures else ''
        told = (
            f'An image finds {positives:.1f} positives on average, {100 * alone:.1f} % of the images find none{mixture}'
            f'. {100 * without:.1f} % of the batches have no two images of a class.'
        )
    warnings = []
    lacking = 0.0 if is_balanced else _share_without_company(counts, batch_size)
    if lacking > FEW:
        enough = _sufficient_batch(counts, batch_size)
        larger = f', and so does a batch of {enough} (--batch-size or --contrast-batch-size)' if enough else ''
        warnings.append(
            f'{100 * lacking:.1f} % of the images find no other image of their class in a batch of {batch_size}, '
            f'although there is one. --class-balance gives it to each{larger}.'
        )
    if single:
        warnings.append(
            f'{single} of {len(counts)} classes have one image. It has no positive'
            + (' but its mixture' if has_mixtures else '')
            + ' in any batch: more images of these classes help, or leave the classes out.'
        )
    return told, warnings
