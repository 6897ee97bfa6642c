import json
import sys
import time

import pytest
import timm
import torch
from commands import ONE_THREAD, environment_with, run_command
from hub_server import TOKEN, HubServer, connect_client
from runs import train


@pytest.fixture
def server():
    server = HubServer()
    yield server
    server.end()


@pytest.fixture
def hub(server, monkeypatch):
    """The client of this process speaks to the server, with a token, and does not wait between attempts."""
    connect_client(server, monkeypatch)
    server.waits = []
    monkeypatch.setattr(time, 'sleep', server.waits.append)
    return server


@pytest.fixture
def environment(server, tmp_path):
    """What a process needs to speak to the server, with a cache of its own."""
    own = dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'home'), HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET='1')
    return environment_with(**own, **ONE_THREAD)


@pytest.fixture
def run_python(environment, tmp_path):
    """What Python code prints, run in tmp_path by a fresh process that speaks to the server."""

    def run_python(code, **more):
        command = [sys.executable, '-W', 'ignore', '-c', code]
        return run_command(command, {**environment, **more}, cwd=tmp_path).stdout

    return run_python


@pytest.fixture
def model():
    return timm.create_model('test_resnet', num_classes=3).eval()


@pytest.fixture(scope='session')
def run_folder(tmp_path_factory):
    """A folder as a run leaves it, of 2 epochs."""
    flags = ['--label-fraction', '0.05', '--epochs', '2', '--workers', '0', '--coretune']
    flags += ['--model-ema', '--model-ema-publish', 'ema']
    return train(None, tmp_path_factory.mktemp('runs'), *flags, base=())


@pytest.fixture
def plain_timm(run_python, tmp_path):
    """Outputs of a model, in a fresh process that knows nothing of timm_coretune, and all it prints."""

    def plain_timm(name, image, more_code=''):
        torch.save(image, tmp_path / 'image.pt')
        code = (
            'import json, sys, timm, torch\n'
            f'model = timm.create_model({name!r}, pretrained=True).eval()\n'
            'assert "timm_coretune" not in sys.modules\n'
            'torch.save(model(torch.load("image.pt")), "output.pt")\n'
            'cfg = timm.data.resolve_data_config({}, model=model)\n'
            'print(json.dumps({**cfg, "label_names": model.pretrained_cfg.get("label_names")}))\n' + more_code
        )
        config, *printed = run_python(code).splitlines()
        return torch.load(tmp_path / 'output.pt'), json.loads(config), printed

    return plain_timm
