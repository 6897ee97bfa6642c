"""Seeds that depend on the seed of a run and on a place in it, and random draws from them"""

import contextlib
import hashlib
import random
from typing import Iterator, Optional

import numpy as np
import torch
from torch.utils.data import get_worker_info


def make_key(*numbers: int) -> int:
    """Hash numbers to a seed in [0, 2**63). Seeds of different numbers are unrelated."""
    digest = hashlib.blake2b(b'%d,' * len(numbers) % numbers, digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_torch(key: int, device: Optional[torch.device] = None) -> None:
    """Seed the generators of torch, on the CPU and, if given, on a device."""
    torch.default_generator.manual_seed(key)
    if device is not None and device.type != 'cpu':
        getattr(torch, device.type).manual_seed(key)


def seed_generators(key: int, device: Optional[torch.device] = None) -> None:
    """Seed the generators of Python, NumPy and torch, on the CPU and, if given, on a device."""
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002, timm draws from this generator
    seed_torch(key, device)


@contextlib.contextmanager
def kept_generators(device: Optional[torch.device] = None) -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch after the context, on the CPU and, if given, on a device."""
    accelerator = [] if device is None or device.type == 'cpu' else [device]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(accelerator, device_type=accelerator[0].type if accelerator else 'cuda'):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def seeded(key: int, device: Optional[torch.device] = None) -> Iterator[None]:
    """Seed all generators in the context and restore them after it. Loader workers draw nothing else and skip that."""
    if get_worker_info() is not None:
        seed_generators(key)
        yield
        return
    with kept_generators(device):
        seed_generators(key, device)
        yield
