"""Protects the number of exchanges between processes: one forward and one backward in a step, and no wasted bytes"""

import pytest
import torch.distributed as dist
from exchange_worker import BATCH, CLASSES, METHODS, WORLD_SIZE
from ranks import launch_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason='torch was built without gloo'
)

INDEX, FLOAT = 8, 4  # bytes of a class index, and of a number
P = 16  # width of the embedding


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return launch_ranks('exchange_worker.py', WORLD_SIZE, tmp_path_factory.mktemp('ranks'))


def bytes_of_a_row(name, width):
    """What has to be sent for each row forward, and what comes back: D features, C logits, P embeddings."""
    target, features, logits, unit = INDEX, FLOAT * width, FLOAT * CLASSES, FLOAT * P
    return {
        'core': (target + features + logits + unit, features + logits + unit),
        'core, smooth none': (target + features + unit, features + unit),
        'core, no mixtures in the contrast': (target + features + logits + unit, logits + unit),
        'core, no mixtures at all': (target + unit, unit),
        'core, no contrast': (target + features + logits, logits),
        'scl': (target + unit, unit),
        'bcl': (target + unit, unit),
    }[name]


@pytest.mark.parametrize('name', [name for name in METHODS if name != 'segmentation'])
def test_a_step_makes_one_exchange_forward_and_one_backward(found, name):
    for rank in found:
        forward, backward = bytes_of_a_row(name, rank[name]['width'])
        assert rank[name]['forward'] == {'calls': 1, 'bytes': BATCH * forward}
        # gloo sums the rows of all processes in each of them
        assert rank[name]['backward'] == {'calls': 1, 'bytes': WORLD_SIZE * BATCH * backward}


def test_segmentation_exchanges_the_number_of_pixels_too(found):
    for rank in found:
        assert rank['segmentation']['forward']['calls'] == 2
        assert rank['segmentation']['backward']['calls'] == 1
