"""Runs of train.py that end with a push to a Hub on loopback"""

import logging
import shlex
import signal
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
import yaml
from commands import in_two_processes
from hub_server import TOKEN
from paths import ROOT
from safetensors.torch import load_file

from timm_coretune.hub.__main__ import run as run_cli
from timm_coretune.train import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]


def train_flags(tmp_path, *flags):
    quick = ('--label-fraction', '0.05', '--epochs', '1', '--workers', '0')
    return [*quick, '--output', str(tmp_path), '--experiment', 'run', '--push-to-hub', 'me/tuned', *flags]


def test_training_in_two_processes_ends_with_a_repository_that_plain_timm_loads(
    server, environment, tmp_path, launch, plain_timm
):
    flags = train_flags(tmp_path, '--device', 'cpu', '--hub-private', '--hub-revision', 'first')
    finished = launch(in_two_processes(ROOT / 'train.py', *flags), environment=environment)
    assert finished.stderr.count('Pushed: ') == 1
    repository = server.repositories['me/tuned']
    assert repository.private
    assert [len(commits) for commits in repository.branches.values()] == [1, 2]
    files = repository.files('first')
    assert TOKEN not in finished.stderr + finished.stdout
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / 'run').iterdir())
    assert yaml.safe_load(files['args.yaml']).keys().isdisjoint(('push_to_hub', 'hub_private', 'hub_revision'))
    image = torch.randn(2, 3, 32, 32)
    output, config, _ = plain_timm('hf-hub:me/tuned@first', image)
    tuned = timm.create_model('test_resnet', num_classes=10)
    tuned.load_state_dict(load_file(tmp_path / 'run' / 'model_best.safetensors'))
    assert torch.equal(output, tuned.eval()(image))
    assert config['label_names'][0] == 'T-shirt/top'


def test_training_that_was_not_pushed_ends_with_3_and_its_command_pushes_later(
    hub, environment, tmp_path, caplog, monkeypatch
):
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    caplog.set_level(logging.INFO)
    with pytest.raises(SystemExit) as ended:
        main(train_flags(tmp_path))
    assert ended.value.code == 3
    assert 'There is no token to push to the Hub with' in caplog.text.split('Train: 0')[0]
    message = caplog.records[-1].getMessage()
    assert message.startswith('Trained, but not pushed: there is no token for the Hub.')
    assert f'Everything is in {tmp_path / "run"}.' in message
    assert hub.repositories == {}

    # killed in the middle of the upload, then tried again
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    words = shlex.split(message.split('Try again with:\n')[1])
    hub.fail('upload', 'hang')
    command = [sys.executable, *words[1:]]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        assert hub.hanging.wait(timeout=60)
        process.send_signal(signal.SIGKILL)
    assert len(hub.repositories['me/tuned'].branches['main']) == 1
    run_cli(words[3:])
    weights = hub.repositories['me/tuned'].files()['model.safetensors']
    assert weights == (tmp_path / 'run' / 'model_best.safetensors').read_bytes()
