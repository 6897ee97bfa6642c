"""Seeds made of the seed of a run and a place in it, and drawing from them"""

import contextlib
import hashlib
import random
from typing import Iterator, Optional

import numpy as np
import torch
from torch.utils.data import get_worker_info


def make_key(*numbers: int) -> int:
    """A seed that looks unrelated for any change of the numbers, in [0, 2**63)."""
    digest = hashlib.blake2b(b'%d,' * len(numbers) % numbers, digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_generators(key: int, device: Optional[torch.device] = None) -> None:
    """Seed Python, NumPy, and torch on the CPU and on an accelerator if one is given."""
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002, timm draws from this generator
    torch.default_generator.manual_seed(key)
    if device is not None and device.type != 'cpu':
        getattr(torch, device.type).manual_seed(key)


@contextlib.contextmanager
def seeded(key: int, device: Optional[torch.device] = None) -> Iterator[None]:
    """Draw from key inside. In a loader worker, which draws nothing else, the generators are not put back."""
    if get_worker_info() is not None:
        seed_generators(key)
        yield
        return
    accelerator = [] if device is None or device.type == 'cpu' else [device]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(accelerator, device_type=accelerator[0].type if accelerator else 'cuda'):
        seed_generators(key, device)
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
