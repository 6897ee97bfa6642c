"""Runs of train.py --segmentation on few small images"""

import csv
from functools import partial

import numpy as np
import runs
from PIL import Image
from runs import ON_CPU, rows_of

FIGURES = ('loss', 'pa', 'mpa', 'miou', 'fwiou')

SIZE = 64

FLAGS = (
    *(*ON_CPU, '--segmentation', '--model-kwargs', 'output_stride=8', '--img-size', str(SIZE), '-b', '4'),
    *('--epochs', '1'),
)

FILES = {
    *('args.yaml', 'checkpoint-0.pth.tar', 'confusion.csv', 'confusion.png', 'curves.png', 'last.pth.tar'),
    *('model_best.pth.tar', 'model_best.safetensors', 'per_class.csv', 'segmentation.json', 'segmentation.png'),
    'summary.csv',
}

train = partial(runs.train, base=FLAGS)


def last_row(folder):
    return {name: float(value) for name, value in rows_of(folder / 'summary.csv')[-1].items()}


def read_counts(folder):
    """Pixels by true and predicted class, from confusion.csv."""
    with open(folder / 'confusion.csv', newline='') as f:
        return np.array([[int(n) for n in row[1:]] for row in list(csv.reader(f))[1:]])


def valid_pixels(data, split):
    """Pixels of every class in the masks of a split, made square of SIZE by the middle of what meets in a pixel."""
    counts = np.zeros(11, int)
    for stem in (data / 'ImageSets' / 'Segmentation' / f'{split}.txt').read_text().split():
        mask = np.array(Image.open(data / 'SegmentationClass' / f'{stem}.png'))
        place = ((np.arange(SIZE) + 0.5) * len(mask) / SIZE).astype(int)
        counts += np.bincount(mask[place][:, place].flatten(), minlength=256)[:11]
    return counts


SIZES = [(50, 37), (81, 64), (33, 120), (64, 64), (20, 17), (97, 31), (65, 65), (128, 40), (41, 90), (70, 55)]

NAMES = ['sky', 'sea', 'sand']


def write_odd(folder, layout, first_class=0, borders_only=False):
    """Ten images of different sizes whose thirds have the classes in turn, with a border of 255."""
    images, masks = ('JPEGImages', 'SegmentationClass') if layout == 'voc' else ('images', 'masks')
    for name in (images, masks):
        (folder / name).mkdir(parents=True)
    for number, (width, height) in enumerate(SIZES):
        values = np.arange(height)[:, None] * 3 // height + np.zeros((1, width), int)
        image = (values * 80)[..., None] + np.array([20, 40, 60])
        mask = values + first_class
        mask[:2], mask[-2:], mask[:, :2], mask[:, -2:] = 255, 255, 255, 255
        if borders_only and number:
            mask[:] = 255
        Image.fromarray(image.astype(np.uint8)).save(folder / images / f'{number}.png')
        Image.fromarray(mask.astype(np.uint8)).save(folder / masks / f'{number}.png')
    if layout == 'voc':
        lists = folder / 'ImageSets' / 'Segmentation'
        lists.mkdir(parents=True)
        (lists / 'train.txt').write_text('\n'.join(map(str, range(1, 10))))
        (lists / 'val.txt').write_text('0\n')
    return folder
