"""What the installed timm may lack"""

import inspect

import pytest
from timm.data import create_loader


def skip_without_loader_option(flags):
    """Older versions of timm lack an option of its loader."""
    if '--train-img-sizes' in flags and 'input_size_choices' not in inspect.signature(create_loader).parameters:
        pytest.skip('the installed timm has no training sizes that change')
