"""A run, validation alone, the card and plain timm measure the same on the same images, whatever holds the images"""

import json
import re
import tarfile

import numpy as np
import pytest
import timm
import torch
from commands import ONE_THREAD, environment_with, in_two_processes, run_command
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from paths import ROOT
from PIL import Image
from runs import ON_CPU, results_of, rows_of

from timm_coretune.hub import push_run

CLASSES = ('ant', 'bee', 'cat')
COUNTS = {'train': 6, 'validation': 7}  # of each class
PREPROCESSING = ('--img-size', '24', '--mean', '0.3', '0.4', '0.2', '--std', '0.1', '0.3', '0.2', '--crop-pct', '0.6')
FLAGS = ('--coretune', '--epochs', '1', '--lr', '0.02', *PREPROCESSING)
ROTATED_BY_90 = 6  # value of EXIF


def draw_pictures(mode='RGB'):
    """Pictures by split, as pairs of a picture and the index of its class, which has a brighter colour channel."""
    draw = np.random.default_rng(0)
    pictures = {}
    for split, count in COUNTS.items():
        pictures[split] = []
        for place in range(3 * count):
            pixels = draw.integers(0, 200, (40, 48, len(mode)))
            pixels[8:-8, 8:-8, place % 3] += 30
            pictures[split].append((Image.fromarray(pixels.astype(np.uint8), mode), place % 3))
    return pictures


def write_folders(root, pictures, validation='validation', **options):
    """Folders of classes below folders of splits, whose files are numbered."""
    for split, pairs in pictures.items():
        for number, (picture, label) in enumerate(pairs):
            folder = root / (split if split == 'train' else validation) / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f'{number}.png', **options)


# Each writes data below a folder. It returns the flags that name the data, and the validation images as a viewer shows
# them, with their labels.


def own_folders(root):
    pictures = draw_pictures()
    write_folders(root / 'data', pictures, 'val')
    return ['--data-dir', root / 'data'], pictures['validation']


def tar(root):
    pictures = draw_pictures()
    write_folders(root / 'data', pictures)
    with tarfile.open(root / 'data.tar', 'w') as file:
        file.add(root / 'data', arcname='data')
    return ['--data-dir', root / 'data.tar'], pictures['validation']


def hfds(root):
    pictures = draw_pictures()
    (root / 'hub').mkdir()
    features = Features({'image': ImageFeature(), 'label': Value('int64')})
    for split, pairs in pictures.items():
        columns = {'image': [picture for picture, _ in pairs], 'label': [label for _, label in pairs]}
        Dataset.from_dict(columns, features=features).to_parquet(root / 'hub' / f'{split}.parquet')
    return ['--data-dir', root / 'cache', '--dataset', f'hfds/{root / "hub"}'], pictures['validation']


def csv_of_labels(root):
    pictures = draw_pictures()
    for split, pairs in pictures.items():
        folder = root / 'hub' / split
        folder.mkdir(parents=True)
        lines = ['file_name,label']
        for number, (picture, label) in enumerate(pairs):
            picture.save(folder / f'{number}.png')
            lines.append(f'{number}.png,{CLASSES[label]}')
        (folder / 'metadata.csv').write_text('\n'.join(lines))
    return ['--data-dir', root / 'cache', '--dataset', f'hfds/{root / "hub"}'], pictures['validation']


def unreadable_files(root):
    pictures = draw_pictures()
    write_folders(root / 'data', pictures)
    for number in (0, 4):
        for split in COUNTS:
            (path,) = (root / 'data' / split).glob(f'*/{number}.png')
            path.write_bytes(path.read_bytes()[:200])
    shown = [pair for number, pair in enumerate(pictures['validation']) if number not in (0, 4)]
    return ['--data-dir', root / 'data', '--skip-unreadable'], shown


def exif(root):
    pictures = draw_pictures()
    tag = Image.Exif()
    tag[0x0112] = ROTATED_BY_90
    write_folders(root / 'data', pictures, exif=tag)
    return ['--data-dir', root / 'data'], [
        (picture.rotate(-90, expand=True), c) for picture, c in pictures['validation']
    ]


def alpha(root):
    pictures = draw_pictures('RGBA')
    write_folders(root / 'data', pictures)
    shown = []
    for picture, label in pictures['validation']:
        background = Image.new('RGBA', picture.size, 'white')
        shown.append((Image.alpha_composite(background, picture).convert('RGB'), label))
    return ['--data-dir', root / 'data'], shown


def measure_with_timm(folder, shown):
    """Top-1 accuracy and loss of the model in a folder, by timm and torch alone."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        logits = torch.cat([model(transform(picture)[None]) for picture, _ in shown]).double()
    label = torch.tensor([label for _, label in shown])
    top1 = 100 * (logits.argmax(dim=1) == label).double().mean()
    return {'top1': top1.item(), 'loss': torch.nn.functional.cross_entropy(logits, label).item()}


def figures_of_card(card):
    rows = dict(re.findall(r'^\| (Top-1 accuracy|Cross-entropy) \([^|]*\| ([0-9.e+-]+) \|', card, re.MULTILINE))
    return {'top1': rows['Top-1 accuracy'], 'loss': rows['Cross-entropy']}


def shown_digits(scores):
    """Scores with as many digits as the card shows."""
    return {key: f'{scores[key]:.4g}' for key in ('top1', 'loss')}


@pytest.mark.parametrize('write', [own_folders, tar, hfds, csv_of_labels, unreadable_files, exif, alpha])
def test_figures_agree(write, hub, tmp_path):
    data, shown = write(tmp_path)
    (result,) = results_of(None, tmp_path, *data, *FLAGS)
    folder = tmp_path / 'run'
    expected = shown_digits(measure_with_timm(folder, shown))
    assert shown_digits(result['validation']) == expected
    (row,) = rows_of(folder / 'summary.csv')
    assert shown_digits({key: float(row[f'eval_{key}']) for key in expected}) == expected
    (alone,) = results_of(None, tmp_path, *data, '--eval-only', '--model', folder, base=('--device', 'cpu'))
    assert shown_digits(alone['validation']) == expected
    push_run(folder, 'me/tuned')
    assert figures_of_card(hub.repositories['me/tuned'].files()['README.md'].decode()) == expected


@pytest.mark.parametrize('channels, mode, size', [(1, 'L', ()), (4, 'RGBA', ('--img-size', '24'))], ids=['L', 'RGBA'])
def test_figures_of_any_number_of_channels_agree(channels, mode, size, hub, tmp_path):
    pictures = draw_pictures('RGBA')
    pictures = {
        split: [(picture.convert(mode), label) for picture, label in pairs] for split, pairs in pictures.items()
    }
    write_folders(tmp_path / 'data', pictures)
    flags = ('--in-chans', channels, '--input-img-mode', mode, '--crop-pct', '0.6', '--epochs', '1', *size)
    base = [word for word in ON_CPU if word not in ('--img-size', '32')]
    (result,) = results_of(tmp_path / 'data', tmp_path, *flags, base=base)
    folder = tmp_path / 'run'
    expected = shown_digits(measure_with_timm(folder, pictures['validation']))
    assert shown_digits(result['validation']) == expected
    push_run(folder, 'me/tuned')
    files = hub.repositories['me/tuned'].files()
    assert figures_of_card(files['README.md'].decode()) == expected
    described = json.loads(files['config.json'])['pretrained_cfg']
    assert [len(described[key]) for key in ('mean', 'std')] == [channels, channels]
    assert described['input_size'][0] == channels


@pytest.mark.slow
def test_figures_of_two_processes_agree(hub, tmp_path):
    data, shown = own_folders(tmp_path)
    script, flags = ROOT / 'train.py', ['--output', tmp_path, '--experiment', 'run']
    environment = environment_with(**ONE_THREAD)
    run_command(in_two_processes(script, *data, *flags, *ON_CPU, *FLAGS), environment)
    folder = tmp_path / 'run'
    expected = shown_digits(measure_with_timm(folder, shown))
    (row,) = rows_of(folder / 'summary.csv')
    assert shown_digits({key: float(row[f'eval_{key}']) for key in expected}) == expected
    alone = run_command(in_two_processes(script, *data, '--eval-only', '--model', folder), environment).stdout
    assert shown_digits(json.loads(alone.split('--result\n')[1])[0]['validation']) == expected
    push_run(folder, 'me/tuned')
    assert figures_of_card(hub.repositories['me/tuned'].files()['README.md'].decode()) == expected
