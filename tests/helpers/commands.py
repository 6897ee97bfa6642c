"""Commands of this environment, and train.py in two processes"""

import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT

ONE_THREAD = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def environment_with(**more):
    """That of this process, whose commands come first."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return {**os.environ, 'PATH': path, **more}


def run_command(words, environment=None, check=True, timeout=300, **kwargs):
    """A command that has ended, well unless check is False, with what it wrote."""
    env = environment_with() if environment is None else environment
    words = [str(word) for word in words]
    finished = subprocess.run(words, env=env, capture_output=True, text=True, timeout=timeout, **kwargs)
    assert not check or finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def in_two_processes(script, *words):
    return ['accelerate', 'launch', '--config_file', str(ROOT / 'configs' / 'cpu_2.yaml'), str(script), *words]
