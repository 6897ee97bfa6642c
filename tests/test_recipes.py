"""Recipes of the paper's data sets: the parser knows their lines, each has a source, and they train"""

import json
import pickle
import re

import numpy as np
import pytest
import yaml
from paths import ASSETS, ROOT
from PIL import Image
from runs import rows_of
from tiny_data import write_folders
from torchvision import datasets

from timm_coretune.train import main
from timm_coretune.train.cli.arguments import parse_args

RECIPES = {path.stem: path for path in sorted((ROOT / 'recipes').glob('*.yaml'))}
README = (ROOT / 'recipes' / 'README.md').read_text()
# number of classes, and the authors' top-1 of CE-tuning and of Core-tuning (arXiv 2308.12058, table 1)
PAPER = {
    'imagenet20': (20, '88.28', '92.73'),
    'cifar10': (10, '94.70', '97.31'),
    'cifar100': (100, '80.27', '84.13'),
    'dtd': (47, '71.68', '75.37'),
    'caltech101': (101, '91.87', '93.46'),
    'cars': (196, '88.61', '90.17'),
    'pets': (37, '89.05', '92.36'),
    'flowers': (102, '98.49', '99.18'),
    'aircraft': (100, '86.87', '89.48'),
}
SOURCES = 'paper|released run|ours|timm|torchvision|data set'
# a small model in place of resnet50, and one update
QUICK = (
    *('--model', 'test_resnet', '--pretrained-path', ASSETS / 'test_resnet_mocov2.safetensors', '--device', 'cpu'),
    *('--workers', '0', '--epochs', '1', '--grad-accum-steps', '1', '--experiment', 'run', '--output'),
)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing at their end, which would take longer than they do."""
    monkeypatch.setattr('timm_coretune.train.session._summarize', lambda *args: None)


def run(name, output, data, batch_size, *flags):
    """The row of the summary and the number of classes of the model, after an epoch of one batch."""
    words = ['-c', RECIPES[name], *QUICK, output, '--data-dir', data, '-b', batch_size, *flags]
    main([str(word) for word in words])
    (row,) = rows_of(output / 'run' / 'summary.csv')
    config = 'segmentation.json' if name == 'voc' else 'config.json'
    return row, json.loads((output / 'run' / config).read_text())['num_classes']


def write_cifar(root, name, num_classes):
    """Files of the layout of CIFAR, as many images as classes in each."""
    kind = getattr(datasets, name.upper())
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    labels = list(range(num_classes))
    images = np.tile(2 * np.arange(num_classes, dtype=np.uint8)[:, None], 3072)
    key = 'labels' if num_classes == 10 else 'fine_labels'
    for file, _ in (*kind.train_list, *kind.test_list):
        (folder / file).write_bytes(pickle.dumps({'data': images, key: labels}))
    names = [f'class {label}' for label in labels]
    (folder / kind.meta['filename']).write_bytes(pickle.dumps({kind.meta['key']: names}))


def test_there_is_a_recipe_for_each_data_set_of_the_paper():
    assert set(RECIPES) == {*PAPER, 'voc'}


@pytest.mark.parametrize('name', RECIPES)
def test_each_line_has_its_source_and_none_comes_twice(name):
    lines = [line for line in RECIPES[name].read_text().splitlines() if line and line[0] != '#']
    for line in lines:
        assert re.fullmatch(rf'\w+: \S.*? +# ({SOURCES})\b.*', line), line
    assert len(lines) == len(yaml.safe_load(RECIPES[name].read_text()))


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_that_of_the_paper(name):
    settings = parse_args(['-c', str(RECIPES[name])]).settings
    loss = settings.loss
    assert loss.coretune
    assert (loss.contrast_weight, loss.contrast_temperature, loss.projection_dim) == (0.1, 0.07, 256)
    assert (loss.coretune_alpha, loss.coretune_min_positive_lam, loss.coretune_min_negative_lam) == (1, 0, 0.8)
    assert (loss.coretune_smooth, loss.coretune_mixtures, loss.coretune_positive_candidates) == ('both', 'both', 0)
    assert loss.coretune_smooth_weight is None
    assert (settings.model.model, settings.model.pretrained_path) == ('resnet50', 'mocov2_resnet50')
    assert settings.data.segmentation == (name == 'voc')
    optimization = settings.optimization
    if name != 'voc':
        assert settings.data.batch_size * optimization.grad_accum_steps == 256
        assert (optimization.opt, optimization.momentum, optimization.weight_decay) == ('sgd', 0.9, 1e-4)
        assert (optimization.lr, optimization.sched, optimization.epochs) == (0.01, 'cosine', 100)
        assert (optimization.warmup_epochs, loss.smoothing) == (0, 0)


@pytest.mark.parametrize('name', PAPER)
def test_published_figures_are_those_of_the_authors(name):
    _, plain, core = PAPER[name]
    text = RECIPES[name].read_text()
    assert f'CE-tuning {plain} %, Core-tuning {core} % (table 1 of arXiv 2308.12058' in text
    (row,) = [line for line in README.splitlines() if f'recipes/{name}.yaml' in line]
    assert row.endswith(f'| {plain} / {core} |')
    assert f'| {PAPER[name][0]} |' in row


@pytest.mark.parametrize('name', PAPER)
def test_a_recipe_makes_a_step_on_images_of_its_number_of_classes(name, tmp_path, monkeypatch, no_pictures):
    num_classes, data, flags = PAPER[name][0], tmp_path / 'data', []
    num_images = num_classes
    if name.startswith('cifar'):
        write_cifar(data, name, num_classes)
        monkeypatch.setattr(datasets.cifar, 'check_integrity', lambda path, md5=None: True)  # not the real files
        num_images = 5 * num_classes if name == 'cifar10' else num_classes
    elif name == 'pets':
        records = pytest.importorskip('datasets')
        for number, split in enumerate(('train', 'test')):
            images = [Image.new('RGB', (32, 32), (5 * label, number, 0)) for label in range(num_classes)]
            rows = records.Dataset.from_dict({'image': images, 'label': list(range(num_classes))})
            (tmp_path / 'hub').mkdir(exist_ok=True)
            rows.to_parquet(tmp_path / 'hub' / f'{split}.parquet')
        flags = ['--dataset', f'hfds/{tmp_path / "hub"}']
    else:
        validation = 'val' if name == 'imagenet20' else 'test'
        classes = [f'{label:03d}_class' for label in range(num_classes)]
        write_folders(data, {f'{split}/{label}': 1 for split in ('train', validation) for label in classes}, size=32)
    row, found = run(name, tmp_path, data, num_images, '--img-size', '32', *flags)
    assert found == num_classes
    assert 0 <= float(row['eval_top1']) <= 100
    assert 0 < float(row['train_contrast']) < 20
    assert 0 < float(row['train_task']) < 20


def test_the_recipe_of_voc_makes_a_step_on_masks_of_its_classes(tmp_path, no_pictures):
    folder = tmp_path / 'data' / 'VOCdevkit' / 'VOC2012'
    for name in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (folder / name).mkdir(parents=True)
    for split, classes in (('train', range(17)), ('val', range(17, 21))):
        for label in classes:
            Image.new('RGB', (64, 64), (10 * label, 0, 0)).save(folder / 'JPEGImages' / f'{label}.jpg')
            mask = Image.new('L', (64, 64), label)
            mask.paste(255, (0, 0, 64, 4))  # the outline that is ignored
            mask.save(folder / 'SegmentationClass' / f'{label}.png')
        (folder / 'ImageSets' / 'Segmentation' / f'{split}.txt').write_text(''.join(f'{label}\n' for label in classes))
    row, found = run('voc', tmp_path, tmp_path / 'data', 17, '--img-size', '64')
    assert found == 21
    assert 0 <= float(row['eval_miou']) <= 100
    assert 0 < float(row['train_contrast']) < 20
