"""Runs of train.py in this process"""

import csv

from accelerate.state import AcceleratorState

from timm_coretune.train import Trainer
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.session import run
from timm_coretune.train.watching.validator import Validator

SMALL = (
    *('--model', 'test_resnet', '--img-size', '32', '--workers', '0', '--epochs', '2', '--warmup-epochs', '0'),
    *('-b', '8', '--lr', '0.05'),
)
ON_CPU = (*SMALL, '--device', 'cpu')


def results_of(data, output, *flags, base=ON_CPU):
    """What a run returns that writes to output/run, with the flags of base unless others follow.

    Without data it takes the sample.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # a run is configured once in a process
    words = [] if data is None else ['--data-dir', data]
    words = [str(word) for word in (*words, '--output', output, '--experiment', 'run', *base, *flags)]
    return run(parse_args(words), words)


def train(data, output, *flags, base=ON_CPU):
    """The folder output/run of a run, see results_of."""
    results_of(data, output, *flags, base=base)
    return output / 'run'


def rows_of(path):
    """Rows of a table as dictionaries."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def outcome(folder):
    """What two runs must have alike, byte by byte."""
    return {name: (folder / name).read_bytes() for name in ('summary.csv', 'model_best.safetensors')}


def stop_at(monkeypatch, name, count):
    """Press Ctrl-C in the call of a method of Trainer or Validator with that index."""
    owner = Trainer if hasattr(Trainer, name) else Validator
    original, calls = getattr(owner, name), []

    def stopping(self, *args, **kwargs):
        calls.append(0)
        if len(calls) > count:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def copy_of(folder, output):
    """The files of a run in output/run."""
    target = output / 'run'
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
