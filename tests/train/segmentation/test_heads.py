"""The heads of docs/segmentation.md train by its commands, and are loaded again"""

import re
import shlex

import pytest
import torch
from paths import ROOT
from runs import train
from segmentation_runs import last_row

import timm_coretune

PAGE = (ROOT / 'docs' / 'segmentation.md').read_text()
COMMANDS = re.findall(r'^accelerate launch train.py (.*--segmentation-head.*)$', PAGE, re.MULTILINE)


def test_the_commands_are_those_that_are_run_here():
    assert len(COMMANDS) == 3
    assert [command.split('--segmentation-head ')[1].split()[0] for command in COMMANDS] == ['linear', 'linear', 'eomt']


@pytest.mark.slow
@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_trains_a_head_that_is_loaded_with_its_scores(command, voc, tmp_path):
    few = ('--epochs', '2', '--img-size', '64', '-b', '4', '--device', 'cpu', '--workers', '0')
    small = ('--model', 'test_resnet', '--model-kwargs', 'output_stride=8') if '--model' not in command else ()
    folder = train(voc, tmp_path, *small, *shlex.split(command), *few, base=())
    model = timm_coretune.load_segmentation_model(folder)
    assert model.head in command
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 11, 64, 64)
    assert last_row(folder)['train_dense'] > 0
