"""Give the images of the bundled Fashion-MNIST sample several labels each: attributes of clothes, none for a bag

The images and their splits are those of the sample. The file is for train.py --task multilabel:

    python scripts/make_attributes.py attributes.safetensors
    python train.py --task multilabel --data-dir attributes.safetensors --model test_resnet --img-size 32 --coretune
"""

import argparse
import json
from importlib import resources
from typing import Dict, Tuple

import torch
from safetensors.torch import save_file

from timm_coretune.data.safetensors_images import find_splits, read_split

ATTRIBUTES: Dict[str, Tuple[str, ...]] = {
    'upper body': ('T-shirt/top', 'Pullover', 'Dress', 'Coat', 'Shirt'),
    'lower body': ('Trouser', 'Dress'),
    'long sleeves': ('Pullover', 'Coat', 'Shirt'),
    'outerwear': ('Coat',),
    'footwear': ('Sandal', 'Sneaker', 'Ankle boot'),
    'closed shoe': ('Sneaker', 'Ankle boot'),
    'buttons or laces': ('Coat', 'Shirt', 'Sneaker', 'Ankle boot'),
}


def make_attributes(path: str) -> None:
    """Write the images of all splits of the sample with their multi-hot rows."""
    sample = str(resources.files('timm_coretune') / 'assets' / 'fashion_mnist_sample.safetensors')
    tensors = {}
    for split in find_splits(sample):
        image, label, names = read_split(sample, split)
        assert names is not None
        rows = torch.tensor([[name in of for of in ATTRIBUTES.values()] for name in names], dtype=torch.uint8)
        tensors[f'{split}.image'], tensors[f'{split}.label'] = image, rows[label.long()]
    save_file(tensors, path, {'class_names': json.dumps(list(ATTRIBUTES))})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('path', help='file to write')
    make_attributes(parser.parse_args().path)
