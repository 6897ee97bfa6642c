"""The commands and the code of docs/large_models.md run as they are written"""

import re
import shlex
from importlib.util import find_spec

import pytest
import timm
from paths import ROOT, SAMPLE
from runs import rows_of, train

import timm_coretune
from timm_coretune.segmentation.data.scenes import FashionScenes, write_voc

PAGE = (ROOT / 'docs' / 'large_models.md').read_text()
COMMANDS = re.findall(r'^accelerate launch train.py (.*)$', PAGE, re.MULTILINE)
(CODE,) = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)


def test_the_commands_are_those_that_are_run_here():
    assert len(COMMANDS) == 4


@pytest.mark.slow
@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_tunes_a_model_that_is_loaded_again(command, tiny, tmp_path):
    if 'lora' in command and find_spec('peft') is None:
        pytest.skip('needs peft')
    words = shlex.split(command)
    size = '32' if '--img-size' not in words else '160'
    data = tiny
    if '--segmentation' in words:
        data = tmp_path / 'scenes'
        for split, name in (('train', 'train'), ('validation', 'val')):
            write_voc(FashionScenes(SAMPLE, split, 8), str(data), name)
    few = ('--epochs', '1', '-b', '8', '--device', 'cpu', '--workers', '0', '--img-size', size)
    folder = train(data, tmp_path, *(() if '--model' in words else ('--model', 'test_vit')), *words, *few, base=())
    assert float(rows_of(folder / 'summary.csv')[0]['train_contrast']) > 0
    if '--segmentation' in words:
        assert timm_coretune.load_segmentation_model(folder).head == 'eomt'
    else:
        assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 3


@pytest.mark.slow
@pytest.mark.skipif(find_spec('peft') is None, reason='needs peft')
def test_the_loop_leaves_a_plain_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(CODE, 'large_models.md', 'exec'), {})
    assert timm.create_model('local-dir:tuned', pretrained=True).num_classes == 3
