"""What the installed torch cannot compile"""

import pytest
import torch

# draws inside a compiled region; the task draws outside
needs_generators_in_graphs = pytest.mark.skipif(
    torch.__version__.startswith('2.6.'), reason='torch 2.6 cannot trace the device of a generator'
)
