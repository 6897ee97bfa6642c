import csv
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from timm.data import create_loader

ROOT = Path(__file__).parent.parent


def skip_without_loader_option(flags):
    """Older versions of timm lack an option of its loader."""
    if '--train-img-sizes' in flags and 'input_size_choices' not in inspect.signature(create_loader).parameters:
        pytest.skip('the installed timm has no training sizes that change')


@pytest.fixture(autouse=True)
def _fresh_process():
    """What a new process starts with: the same seed, and an accelerate that was not configured by another test."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def one_thread():
    """As fresh processes have: with more, sums come out in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def launch(tmp_path):
    """Run the words of a shell command in a folder of its own, as a user of this environment would."""

    def run(words, check=True, environment=None, **kwargs):
        # the commands of this environment, and no more than its threads
        env = {**(environment or os.environ), 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
        finished = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, **kwargs)
        assert not check or finished.returncode == 0, finished.stdout + finished.stderr
        return finished

    return run


@pytest.fixture
def read_csv():
    def read(path):
        with open(path, newline='') as f:
            return list(csv.DictReader(f))

    return read
