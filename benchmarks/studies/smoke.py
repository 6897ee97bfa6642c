"""A tiny study of generated pictures, from its file to its tables"""

import os
import random

import yaml
from PIL import Image, ImageDraw

# three arms, each with three learning rates, and two seeds
PLAN = {
    'kind': 'images',
    'flags': '--device cpu --workers 0 --model test_resnet --img-size 32 -b 16 --epochs 2 --warmup-epochs 0 '
    '--color-jitter 0 --checkpoint-hist 1 --metrics per-class',
    'lrs': [0.01, 0.03, 0.1],
    'baseline': 'plain',
    'tune': {'seeds': [100], 'flags': '--val-split val'},
    'test': {'seeds': [0, 1], 'flags': '--val-split test'},
    'networks': {'random': ''},
    'data': {'pictures': {'flags': '--data-dir {data}', 'networks': ['random'], 'labels': {'all': ''}}},
    'arms': {
        'plain': {'title': 'cross-entropy'},
        'core': {'flags': '--coretune', 'weight': {'flag': '--contrast-weight {}', 'values': [0.1, 1]}},
    },
}


def write_pictures(folder: str, num_images: int = 12, size: int = 32) -> None:
    """Write class folders of bars, discs and squares in random places and colours. The classes differ in size."""
    draws = random.Random(0)
    for split in ('train', 'val', 'test'):
        for index, kind in enumerate(('bar', 'disc', 'square')):
            path = os.path.join(folder, split, kind)
            os.makedirs(path)
            for number in range(num_images - 3 * index):
                picture = Image.new('RGB', (size, size), tuple(draws.choices(range(128), k=3)))
                side, tint = draws.randint(8, 16), tuple(draws.choices(range(128, 256), k=3))
                left, top = draws.randint(0, size - side), draws.randint(0, size - side)
                box = (left, top, left + side, top + (side // 3 if kind == 'bar' else side))
                pen = ImageDraw.Draw(picture)
                (pen.ellipse if kind == 'disc' else pen.rectangle)(box, fill=tint)
                picture.save(os.path.join(path, f'{number}.png'))


def write_study(folder: str) -> list:
    """Write pictures and the file of a study into a folder. Returns the words with which study.py does it."""
    write_pictures(os.path.join(folder, 'pictures'))
    plan = os.path.join(folder, 'study.yaml')
    with open(plan, 'w', encoding='utf-8') as f:
        yaml.safe_dump(PLAN, f, sort_keys=False)
    return [plan, '--results', os.path.join(folder, 'results.csv'), '--data-root', os.path.join(folder, 'pictures')]
