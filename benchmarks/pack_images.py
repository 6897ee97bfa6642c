#!/usr/bin/env python3
"""Packs folders of small images into safetensors files, which train.py reads faster.

    python benchmarks/pack_images.py DIR/emoji_vendor DIR/letters

writes DIR/emoji_vendor.safetensors and DIR/letters.safetensors, with a split for each folder of class folders in them.
The pixels are those that train.py reads from the folders. All images of a data set must have one size.
"""

import argparse
import json
import os
from typing import Dict, List

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_coretune.atomic import write_whole
from timm_coretune.data.images import LabelledImages
from timm_coretune.train.data.class_folders import ReaderClassFolders, subfolders


def pack_split(folder: str, split: str, mode: str) -> Dict[str, torch.Tensor]:
    """Images (N, H, W) or (N, H, W, 3) and labels (N,) of a folder of class folders.

    Raises:
        ValueError: The images differ in size.
    """
    path = os.path.join(folder, split)
    dataset = LabelledImages(path, ReaderClassFolders(path), input_img_mode=mode)
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f'Expected images of one size in {path!r}, got {sizes[0]} and {sizes[1]}. Resize them first.')
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return {f'{split}.image': pixels, f'{split}.label': torch.tensor(labels)}


def pack(folder: str) -> str:
    """Write the file of a folder with splits. Returns its path.

    Raises:
        ValueError: The splits have different classes, or images of different sizes.
    """
    folder = folder.rstrip(os.sep)
    splits = subfolders(folder)
    readers = [ReaderClassFolders(os.path.join(folder, split)) for split in splits]
    names: List[str] = list(readers[0].class_to_idx)
    for split, reader in zip(splits, readers, strict=True):
        if list(reader.class_to_idx) != names:
            raise ValueError(f'Expected the class folders of {splits[0]} in {split} of {folder!r}, got others.')
    with Image.open(readers[0][0][0]) as image:
        mode = 'L' if image.mode == 'L' else 'RGB'
    tensors = {name: tensor for split in splits for name, tensor in pack_split(folder, split, mode).items()}
    path = f'{folder}.safetensors'
    with write_whole(path) as temporary:
        save_file(tensors, temporary, {'class_names': json.dumps(names)})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='DIR', help='folder with train/CLASS/, val/CLASS/, ...')
    for folder in parser.parse_args().folders:
        print(pack(folder))


if __name__ == '__main__':
    main()
