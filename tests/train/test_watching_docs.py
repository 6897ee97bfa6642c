"""The commands of docs/watching.md, as they are written: those of train.py in this process, replay in a fresh one"""

import re
import shlex

import pytest
from accelerate.state import AcceleratorState
from commands import ONE_THREAD, environment_with
from paths import ROOT

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.loss_meter import DivergedError
from timm_coretune.train.session import run

TEXT = (ROOT / 'docs' / 'watching.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.slow
def test_every_command_does_what_its_section_says(tmp_path, monkeypatch, launch, read_csv):
    monkeypatch.chdir(tmp_path)
    watched, diverges, replay, tracked = COMMANDS

    def train(command):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = shlex.split(command)
        assert words[:2] == ['python', 'train.py']
        words = [*words[2:], '--label-fraction', '0.1', '--workers', '0']
        return run(parse_args(words), words)

    train(watched)
    rows = read_csv(tmp_path / 'output' / 'train' / 'watched' / 'summary.csv')
    assert [row['epoch'] for row in rows] == ['-1', '0', '1']
    columns = {name.removeprefix('features_') for name in rows[0] if name.startswith('features_')}
    assert columns == set(re.findall(r'\n\| `(\w+)` \| .* \| (?:higher|lower)', TEXT))
    with pytest.raises(DivergedError):
        train(diverges.removesuffix(' || true'))
    words = replay.replace('timm-coretune', 'python -m timm_coretune', 1).split()
    found = launch(words, environment=environment_with(**ONE_THREAD))
    lines = found.stdout.splitlines()
    assert re.fullmatch(r'Update \d+, epoch 0, batch \d+, process 0:', lines[0])
    assert any(line.startswith('First module whose output is not finite: model.') for line in lines), found.stdout
    assert lines[-1] == 'The losses are those of the run.'
    train(tracked)
    assert list((tmp_path / 'output' / 'train' / 'tracked').rglob('events.out.tfevents*'))
