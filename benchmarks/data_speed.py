#!/usr/bin/env python3
"""How many training images does a core load, and what does --gpu-augment leave to it?

    python benchmarks/data_speed.py

prints one Markdown table. Images are the two photos (640 x 427) that come with scikit-learn, as they are, as JPEG of
256 x 256, and as raw pixels of 256 x 256 in a safetensors file. Times are CPU milliseconds (user and system) an image
in one thread, medians of rounds in which all ways take turns: to read and decode, and to augment for 224 x 224 as
timm's transforms do by default (random resized crop, flip, color jitter), with RandAugment, and what is left of the
default with --gpu-augment.
"""

import argparse
import functools
import os
import platform
import statistics
import tempfile
import time
from typing import Callable, Dict

import numpy as np
import PIL
import sklearn.datasets
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform

from timm_coretune.data.device_augment import DeviceAugment
from timm_coretune.data.images import LabelledImages
from timm_coretune.data.safetensors_reader import ReaderSafetensors
from timm_coretune.train.data.class_folders import ReaderClassFolders

SIZE, STORED = 224, 256
WAYS = {
    'decode': None,
    'timm': create_transform(SIZE, is_training=True, interpolation='random', use_prefetcher=True),
    'RandAugment': create_transform(SIZE, is_training=True, auto_augment='rand-m9-mstd0.5-inc1', use_prefetcher=True),
    '--gpu-augment': DeviceAugment((SIZE, SIZE), STORED),
}


def write_images(folder: str) -> Dict[str, LabelledImages]:
    """Write the photos in all ways of storing them, and open them."""
    photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
    small = [photo.resize((STORED, STORED), Image.Resampling.BICUBIC) for photo in photos]
    datasets = {}
    for name, images in (('JPEG 640 x 427', photos), ('JPEG 256 x 256', small)):
        os.makedirs(os.path.join(folder, name, 'photo'))
        for number, image in enumerate(images):
            image.save(os.path.join(folder, name, 'photo', f'{number}.jpg'), quality=90)
        datasets[name] = LabelledImages(folder, ReaderClassFolders(os.path.join(folder, name)), input_img_mode='RGB')
    path = os.path.join(folder, 'small.safetensors')
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
    save_file({'train.image': pixels, 'train.label': torch.tensor([0, 1])}, path)
    datasets['safetensors 256 x 256'] = LabelledImages(path, ReaderSafetensors(path, 'train'), input_img_mode='RGB')
    return datasets


def load(dataset: LabelledImages, transform: Callable, repeats: int) -> float:
    """CPU milliseconds that an image takes."""
    dataset.transform = transform
    start = time.process_time()
    for number in range(repeats):
        dataset[number % 2]
    return 1000 * (time.process_time() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description='Measure how fast training images are loaded.')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--repeats', type=int, default=20, help='images in a round')
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: Dict[str, Dict[str, list]] = {}
    with tempfile.TemporaryDirectory() as folder:
        datasets = write_images(folder)
        for _ in range(args.rounds + 1):  # the first is a warm-up
            for name, dataset in datasets.items():
                for way, transform in WAYS.items():
                    found.setdefault(name, {}).setdefault(way, []).append(load(dataset, transform, args.repeats))
    median = functools.partial(map, lambda values: statistics.median(values[1:]))
    print(f'| ms an image, one core | {" | ".join(WAYS)} | images/s: timm | --gpu-augment |')
    print('| --- ' * (len(WAYS) + 3) + '|')
    for name, ways in found.items():
        times = list(median(ways.values()))
        rates = [f'{1000 / times[place]:.0f}' for place in (1, 3)]
        print(f'| {name} | {" | ".join(f"{t:.2f}" for t in times)} | {" | ".join(rates)} |')
    print(f'\n{platform.processor() or platform.machine()}, torch {torch.__version__}, PIL {PIL.__version__}')


if __name__ == '__main__':
    main()
