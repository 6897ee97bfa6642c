"""fine_tune: its seed, the caller's generators, one number of batches per update, and what it returns"""

import json
import math
import random
import re

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from paths import ROOT
from PIL import Image
from timm.data import create_transform
from tiny_data import write_folders
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from timm_coretune.prediction import Predictor
from timm_coretune.prediction.preparation import describe_transform
from timm_coretune.train import fine_tune
from timm_coretune.train.cli.settings import OptimizationSettings
from timm_coretune.train.loop_config import LoopConfig
from timm_coretune.train.loss_meter import DivergedError


class Noise(Dataset):
    """Images with noise from all three generators, which stands for augmentation. `drawn` has their first pixels."""

    def __init__(self):
        self.drawn = []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.rand(3, 32, 32)
        image[1] *= random.random()
        image[2] *= np.random.rand()  # noqa: NPY002
        self.drawn.append(tuple(image[:, 0, 0].tolist()))
        return image, index % 2


def tuned(global_seed=0, **kwargs):
    """What three epochs drew for augmentation, and the weights after them."""
    data = Noise()
    model = timm.create_model('test_resnet', num_classes=2)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.1)
    torch.manual_seed(global_seed)
    random.seed(global_seed)
    np.random.seed(global_seed)  # noqa: NPY002
    fine_tune(model, DataLoader(data, 4, shuffle=True), epochs=3, accelerator=Accelerator(cpu=True), **kwargs)
    return data.drawn, b''.join(p.detach().numpy().tobytes() for p in model.parameters())


def test_the_seed_decides_on_all_draws():
    assert tuned(0, seed=1) == tuned(5, seed=1)
    (drawn, weights), (others, other_weights) = tuned(0, seed=1), tuned(0, seed=2)
    assert not set(drawn) & set(others)
    assert weights != other_weights
    assert tuned(0, config=LoopConfig(seed=2, eval_metric='loss')) == (others, other_weights)


def test_without_a_seed_that_of_the_caller_decides():
    first, again, other = tuned(1), tuned(1), tuned(2)
    assert first == again
    assert not set(first[0]) & set(other[0])


@pytest.mark.parametrize('coretune', [True, False])
def test_the_generators_of_the_caller_are_as_before(coretune):
    def draws():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    data = DataLoader(Noise(), 4, shuffle=True)
    model = timm.create_model('test_resnet', num_classes=2)
    found = []
    for trains in (False, True):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        if trains:
            fine_tune(model, data, epochs=1, coretune=coretune, accelerator=Accelerator(cpu=True))
        found.append(draws())
    assert found[0] == found[1]


def test_the_generators_of_the_caller_are_as_before_when_training_fails():
    model, data = torch.nn.Linear(1, 2), DataLoader([(torch.tensor([math.nan]), i % 2) for i in range(8)], 4)
    state = torch.get_rng_state(), random.getstate()
    with pytest.raises(DivergedError):
        fine_tune(model, data, epochs=1, coretune=False, accelerator=Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def test_a_score_of_the_validation_selects_nothing_where_nothing_is_validated(messages):
    config = LoopConfig(eval_metric='top1', patience=1)
    data = DataLoader([(torch.tensor([float(i % 2)]), i % 2) for i in range(8)], 4)
    results = fine_tune(
        torch.nn.Linear(1, 2), data, epochs=4, coretune=False, config=config, accelerator=Accelerator(cpu=True)
    )
    losses = [result['train']['loss'] for result in results]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4
    assert not any('stopping' in message for message in messages())


@pytest.mark.parametrize('of_loop, of_rate', [(4, 1), (1, 4), (4, 4)])
def test_the_rate_is_that_of_the_batches_of_an_update(messages, of_loop, of_rate):
    fine_tune(
        timm.create_model('test_resnet', num_classes=2),
        DataLoader([(torch.rand(3, 32, 32), i % 2) for i in range(16)], batch_size=4),
        config=LoopConfig(grad_accum_steps=of_loop),
        optimization=OptimizationSettings(epochs=1, warmup_epochs=0, grad_accum_steps=of_rate, lr_base=0.16),
        accelerator=Accelerator(cpu=True),
    )
    assert 'Learning rate (0.01) calculated from base learning rate (0.16) and effective global batch size (16)' in (
        ' '.join(messages())
    )


def test_two_numbers_of_batches_for_an_update_are_refused():
    with pytest.raises(ValueError, match='grad_accum_steps 4 in config and 2 in optimization'):
        fine_tune(
            timm.create_model('test_resnet', num_classes=2),
            [],
            config=LoopConfig(grad_accum_steps=4),
            optimization=OptimizationSettings(grad_accum_steps=2),
        )


# what is returned


def write_pictures(root, size=40):
    """Folders of red and green pictures of two shapes."""
    for index, name in enumerate(('green', 'red')):
        (root / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 80, (size, size + 4, 3), np.uint8)
            pixels[..., 1 - index] += 150
            Image.fromarray(pixels).save(root / name / f'{number}.png')
    return root


def tuned_on_pictures(root, transform, **kwargs):
    data = ImageFolder(root, transform)
    model = timm.create_model('test_resnet', num_classes=2)
    loader = DataLoader(data, 8, shuffle=True)
    return fine_tune(model, loader, loader, epochs=2, lr=0.1, seed=0, accelerator=Accelerator(cpu=True), **kwargs)


CROP = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()]
TRANSFORM = create_transform((3, 32, 32), crop_pct=0.9, interpolation='bicubic', mean=(0.4, 0.5, 0.6), std=(0.3,) * 3)


def test_the_result_is_the_sequence_of_its_epochs_and_each_has_a_line(tmp_path, capsys):
    results = tuned_on_pictures(write_pictures(tmp_path), TRANSFORM)
    assert [epoch['epoch'] for epoch in results] == [0, 1]
    assert len(results) == 2
    assert results[-1] == list(results)[1]
    lines = capsys.readouterr().out.splitlines()
    for line, epoch in zip(lines, results, strict=True):
        assert line.startswith(f'Epoch {epoch["epoch"] + 1}/2  training: loss {epoch["train"]["loss"]:.4g}, ')
        assert f'task {epoch["train"]["task"]:.4g}, contrast {epoch["train"]["contrast"]:.4g}' in line
        scores = epoch['validation']
        assert f'  validation: loss {scores["loss"]:.4g}, top1 {scores["top1"]:.4g}, ' in line
    assert '(best so far)' in lines[0]
    tuned_on_pictures(tmp_path, TRANSFORM, progress=False)
    assert capsys.readouterr().out == ''


def test_predictions_are_those_of_the_model_and_of_the_saved_folder(tmp_path):
    root = write_pictures(tmp_path / 'data')
    results = tuned_on_pictures(root, TRANSFORM)
    data = ImageFolder(root, TRANSFORM)
    paths = [path for path, _ in data.samples]
    tensors = torch.stack([data[i][0] for i in range(len(data))])
    results.model.eval()
    with torch.no_grad():
        expected = results.model(tensors).softmax(dim=1)
    results.model.train()
    for images in (paths, [Image.open(path) for path in paths], tensors, list(tensors)):
        found = results.predict(images)
        assert [p.indices[0] for p in found] == expected.argmax(dim=1).tolist()
        assert [p.probabilities[0] for p in found] == pytest.approx(expected.amax(dim=1).tolist(), rel=1e-4)
        assert {p.label for p in found} <= {'green', 'red'}
    assert results.model.training
    assert len(results.predict(paths[0])) == len(results.predict(tensors[0])) == 1
    results.save(tmp_path / 'saved')
    saved = Predictor(tmp_path / 'saved')
    assert saved.class_names == ['green', 'red']
    assert [p.probabilities for p in saved(paths)] == [
        pytest.approx(p.probabilities, rel=1e-4) for p in results.predict(paths)
    ]


@pytest.mark.parametrize(
    'transform, expected',
    [
        (TRANSFORM, dict(crop_mode='center', interpolation='bicubic', mean=(0.4, 0.5, 0.6), std=(0.3, 0.3, 0.3))),
        (transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()]), dict(crop_mode='squash')),
        (transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()]), {}),
        (transforms.ToTensor(), dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))),
    ],
    ids=['timm', 'squash', 'torchvision', 'as-it-is'],
)
def test_a_transform_is_described_so_that_timm_makes_the_same(transform, expected):
    config = describe_transform(transform, (3, 32, 32))
    assert config.items() >= {k: pytest.approx(v) if isinstance(v, tuple) else v for k, v in expected.items()}.items()
    is_fixed = isinstance(transform, transforms.ToTensor)
    for size in [(32, 32)] if is_fixed else [(32, 32), (50, 41), (64, 96)]:
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
        assert torch.allclose(create_transform(**config)(image), transform(image), atol=1e-5)


@pytest.mark.parametrize(
    'transform',
    [
        create_transform((3, 32, 32), is_training=True),
        transforms.Compose(
            [transforms.Resize(40), transforms.Grayscale(3), transforms.CenterCrop(32), transforms.ToTensor()]
        ),
        transforms.Compose([*CROP, lambda x: 2 * x]),
        lambda image: 'nothing',
    ],
    ids=['random', 'grey', 'doubled', 'no-tensor'],
)
def test_a_transform_that_timm_does_not_repeat_is_not_described(transform):
    assert describe_transform(transform, (3, 32, 32)) is None


def test_what_is_not_known_is_asked_for(tmp_path, messages):
    root = write_pictures(tmp_path / 'data')
    with pytest.raises(ValueError, match='a name for each of the 2 classes of the model, got 3'):
        tuned_on_pictures(root, TRANSFORM, class_names=['a', 'b', 'c'])
    random_crops = create_transform((3, 32, 32), is_training=True)
    results = tuned_on_pictures(root, random_crops, class_names=['a', 'b'])
    for ask in (lambda: results.save(tmp_path / 'x'), lambda: results.predict(str(root / 'red' / '0.png'))):
        with pytest.raises(ValueError, match='Set data_config'):
            ask()
    assert results.predict(torch.rand(3, 32, 32))[0].label in ('a', 'b')
    results.data_config = dict(input_size=(3, 32, 32))
    assert results.predict(str(root / 'red' / '0.png'))[0].label in ('a', 'b')
    other = DataLoader(ImageFolder(root, TRANSFORM), 8)
    fine_tune(timm.create_model('test_resnet', num_classes=5), other, epochs=1, accelerator=Accelerator(cpu=True))
    assert any('are not taken from the data set' in message for message in messages('WARNING'))


# the documentation


def test_the_code_of_the_docs_runs_as_written(tmp_path, monkeypatch, capsys):
    for split in ('train', 'validation'):
        write_folders(tmp_path / 'pictures' / split, {'ant': 8, 'bee': 8}, size=70)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'notebook.md').read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    predicted = names['tuned'].predict('pictures/validation/ant/0.png')
    *_, score, label = capsys.readouterr().out.splitlines()
    assert (float(score), label) == (names['tuned'][-1]['validation']['top1'], predicted[0].label)
    saved = timm.create_model(f'local-dir:{tmp_path}/tuned', pretrained=True)
    assert saved.pretrained_cfg['label_names'] == ['ant', 'bee']


def kinds_of(notebook):
    """Kinds of the outputs of each cell, and what is in them."""
    cells = [cell.get('outputs', []) for cell in notebook['cells']]
    return [[(output['output_type'], *sorted(output.get('data', {}))) for output in outputs] for outputs in cells]


@pytest.mark.slow
def test_the_notebook_runs_in_a_fresh_kernel_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    from run_notebook import execute

    path = ROOT / 'examples' / 'fine_tune.ipynb'
    stored = json.loads(path.read_text())
    assert path.stat().st_size < 200_000
    for name in ('HTTP_PROXY', 'HTTPS_PROXY'):  # nothing answers there
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    found = execute(str(path), str(tmp_path))  # raises an error of a cell
    assert kinds_of(found) == kinds_of(stored)
    assert sum('image/png' in kind for cell in kinds_of(stored) for kind in cell) == 4
    printed = ''.join(''.join(o['text']) for cell in found['cells'] for o in cell.get('outputs', []) if 'text' in o)
    assert float(printed.split('top-1 ')[1].split()[0]) > 60  # chance: 10
    assert {p.name for p in (tmp_path / 'tuned').iterdir()} == {'config.json', 'model.safetensors'}
    assert [cell['source'] for cell in found['cells']] == [''.join(cell['source']) for cell in stored['cells']]
