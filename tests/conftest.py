import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


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
