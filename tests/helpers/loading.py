"""Options of loaders that the installed timm may lack, and the generators that loading leaves alone"""

import inspect
import random

import numpy as np
import pytest
import torch
from timm.data import create_loader


def skip_without_loader_option(flags):
    """Older versions of timm lack an option of its loader."""
    if '--train-img-sizes' in flags and 'input_size_choices' not in inspect.signature(create_loader).parameters:
        pytest.skip('the installed timm has no training sizes that change')


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
