"""Data sets of a few small images"""

import json

import torch
from PIL import Image
from safetensors.torch import save_file


def write_images(path, train, validation=None, size=16, names=None, noise=256, tint=0, in_turn=True):
    """A safetensors data set of random RGB images, as many of each class as train and validation say.

    Pixels are below noise, and brighter by tint in the channel whose number is the class. The classes take turns,
    or each has all of its images in a row.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, counts in (('train', train), ('validation', validation)):
        if counts is None:
            continue
        places = [(place if in_turn else 0, c) for c, count in enumerate(counts) for place in range(count)]
        label = torch.tensor([c for _, c in sorted(places)])
        image = torch.randint(noise, (len(label), size, size, 3), generator=generator)
        if tint:
            image[torch.arange(len(label)), :, :, label] += tint
        tensors[f'{split}.image'], tensors[f'{split}.label'] = image.byte(), label
    save_file(tensors, path, metadata={'class_names': json.dumps(names)} if names else None)
    return path


def write_folders(root, counts, size=16):
    """Folders of as many images as counts says, such as {'train/ant': 4}, each in a color of its own; returns root."""
    for index, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new('RGB', (size, size), (80 * index % 256, 40 * number % 256, 0)).save(root / name / f'{number}.png')
    return root
