#!/usr/bin/env python3
"""Lays out the bundled sample of Fashion-MNIST as folders of classes, with a share of its training images as val.

Question answered: on which images are settings chosen, when the validation images of the sample are the test? A fifth
of the training images of each class (--val-fraction) becomes val. The same file and seed give the same bytes.

    python scripts/make_fashion.py --output DIR

Any other file with splits train and validation, such as scripts/make_sample.py writes it, is laid out by --input FILE.
"""

import argparse
import logging
import os
import random
import re

import torch
from picture_folders import create_output, save_png, write_readme
from PIL import Image

from timm_coretune.data.safetensors_images import read_split

_logger = logging.getLogger('make_fashion')

SAMPLE = os.path.join(
    os.path.dirname(__file__), os.pardir, 'timm_coretune', 'assets', 'fashion_mnist_sample.safetensors'
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Lay out the bundled sample of Fashion-MNIST as folders of classes')
    parser.add_argument('--input', default=SAMPLE, metavar='FILE', help='safetensors file with train and validation')
    parser.add_argument('--val-fraction', type=float, default=0.2, metavar='F')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', required=True, metavar='DIR', help='empty or new folder')
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        parser.error(f'Expected --val-fraction between 0 and 1, got {args.val_fraction}.')
    return args


def draw_val(label: torch.Tensor, fraction: float, seed: int) -> set[int]:
    """Draws the same share of the images of every class."""
    draws, val = random.Random(seed), set()
    for value in label.unique().tolist():
        members = torch.nonzero(label == value).flatten().tolist()
        val.update(draws.sample(members, round(fraction * len(members))))
    return val


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    args = parse_args()
    train, test = read_split(args.input, 'train'), read_split(args.input, 'validation')
    val = draw_val(train.label, args.val_fraction, args.seed)
    names = train.class_names or [f'{value:03d}' for value in range(int(train.label.max()) + 1)]
    folders = [re.sub('[^A-Za-z0-9]+', '-', name) for name in names]
    create_output(args.output)
    counts = dict.fromkeys(('train', 'val', 'test'), 0)
    for images, is_test in ((train, False), (test, True)):
        for index, (image, label) in enumerate(zip(images.image.numpy(), images.label.tolist(), strict=True)):
            split = 'test' if is_test else 'val' if index in val else 'train'
            save_png(Image.fromarray(image), args.output, split, folders[label], f'{index:05d}.png')
            counts[split] += 1
    licence = 'Fashion-MNIST, MIT, Copyright (c) 2017 Zalando SE. test is the validation split of the sample.'
    write_readme(args.output, f'Fashion-MNIST, sample of {sum(counts.values())} images', counts, licence)
    _logger.info(f'Wrote {args.output}: {counts}')


if __name__ == '__main__':
    main()
