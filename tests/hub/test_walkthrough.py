"""docs/walkthrough.md: its commands run in their order, and plain timm loads what they pushed"""

import csv
import json
import re
import shlex

import pytest
import timm
from commands import run_command
from paths import ROOT
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

PAGE = (ROOT / 'docs' / 'walkthrough.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL) for line in block.splitlines()]
(LOAD,) = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)


def write_pictures(folder):
    """200 pictures to train on, 20 to validate and 20 to test: crops of two photographs, their halves being classes."""
    for photo, name in zip(load_sample_images().images, ('temple', 'flower'), strict=True):
        height, width = photo.shape[0], photo.shape[1] // 2
        for half, side in enumerate(('left', 'right')):
            for number in range(60):
                split = 'train' if number < 50 else 'val' if number < 55 else 'test'
                y, x = (number * 37) % (height - 96), half * width + (number * 53) % (width - 96)
                path = folder / split / f'{name}-{side}' / f'{number}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photo[y : y + 96, x : x + 96]).save(path)


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_their_order(server, environment, tmp_path):
    pytest.importorskip('onnxruntime')
    write_pictures(tmp_path / 'pictures')
    (tmp_path / 'new').mkdir()
    (tmp_path / 'pictures' / 'test' / 'flower-left' / '55.png').rename(tmp_path / 'new' / 'picture.png')
    model = timm.create_model('mobilenetv2_100', num_classes=0)
    save_file(model.state_dict(), tmp_path / 'mobilenetv2.safetensors')

    for command in COMMANDS:
        words = shlex.split(command)
        run_command([*words, '--epochs', '1'] if words[1] == 'train' else words, environment, cwd=tmp_path)
    names = ['flower-left', 'flower-right', 'temple-left', 'temple-right']
    run = tmp_path / 'output' / 'train' / 'pictures'
    assert (run / 'report.html').read_text().startswith('<!')
    assert (tmp_path / 'pictures.onnx').stat().st_size > 1e6
    results = json.loads((tmp_path / 'results' / 'results.json').read_text())
    assert 0 <= results['top1'] <= 100
    with open(tmp_path / 'results' / 'confusion.csv', newline='') as f:
        assert sum(int(value) for row in list(csv.reader(f))[1:] for value in row[1:]) == 19
    with open(tmp_path / 'predictions.csv', newline='') as f:
        (prediction,) = csv.DictReader(f)
    assert prediction['label_1'] in names

    # plain timm in a process of its own says the same
    said, probability = run_command(['python', '-W', 'ignore', '-c', LOAD], environment, cwd=tmp_path).stdout.split()
    assert said == prediction['label_1']
    assert float(probability) == pytest.approx(float(prediction['probability_1']), abs=1e-3)
