"""Keys, and generators that are put back"""

import itertools
import random

import numpy as np
import torch
from loading import global_states

from timm_coretune.data.seeding import make_key, seeded

# keys and order


def test_keys_are_distinct_and_depend_on_every_number_and_its_place():
    numbers = range(-1, 12)
    keys = [make_key(*key) for length in (1, 2, 3) for key in itertools.product(numbers, repeat=length)]
    assert len(set(keys)) == len(keys) == 13 + 13**2 + 13**3
    assert all(0 <= key < 2**63 for key in keys)
    assert make_key(1, 23) != make_key(12, 3)
    bits = np.array([[key >> i & 1 for i in range(63)] for key in keys])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.06  # 5 standard deviations of 2379 fair coins are 0.051


# timm's loaders


def test_generators_are_put_back_after_a_block_that_draws():
    before = global_states()
    draws = []
    for _ in range(2):
        with seeded(5):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert global_states() == before
