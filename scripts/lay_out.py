#!/usr/bin/env python3
"""Lays out a data set of torchvision as folders of classes, which train.py reads: OUTPUT/train and OUTPUT/test.

    python scripts/lay_out.py dtd data/dtd --root downloads --download

Image files are copied as they are. Training and validation images go to train/, test images to test/. Caltech101 has no
splits: 30 random images of each class, the same in every run, go to train/, and the others to test/. flowers and cars
need SciPy.
"""

import argparse
import os
import random
import re
import shutil
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

from torchvision import datasets

_SPLITS: Dict[str, Tuple[Any, Dict[str, Tuple[str, ...]]]] = {
    'dtd': (datasets.DTD, {'train': ('train', 'val'), 'test': ('test',)}),
    'flowers': (datasets.Flowers102, {'train': ('train', 'val'), 'test': ('test',)}),
    'aircraft': (datasets.FGVCAircraft, {'train': ('trainval',), 'test': ('test',)}),
    'cars': (datasets.StanfordCars, {'train': ('train',), 'test': ('test',)}),
}
NAMES = (*_SPLITS, 'caltech101')
_CALTECH_TRAIN = 30  # training images of a class


def find_files(name: str, root: str, download: bool) -> Iterator[Tuple[str, str, str]]:
    """The split, folder of the class and path of every image. Folders are numbered, so that their order stays."""
    if name == 'caltech101':
        if download:
            datasets.Caltech101(root, download=True)
        yield from _split_caltech(os.path.join(root, 'caltech101', '101_ObjectCategories'))
        return
    kind, splits = _SPLITS[name]
    for split, parts in splits.items():
        for part in parts:
            options = {'download': True} if download else {}
            dataset = kind(root, split=part, loader=str, **options)  # its images are their paths
            for index in range(len(dataset)):
                path, label = dataset[index]
                yield split, f'{label:03d}_{re.sub(r"[^A-Za-z0-9]+", "_", dataset.classes[label])}', path


def _split_caltech(folder: str) -> Iterator[Tuple[str, str, str]]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    for name in names:
        if name == 'BACKGROUND_Google':  # no class of objects
            continue
        files = sorted(os.listdir(os.path.join(folder, name)))
        chosen = set(random.Random(name).sample(files, min(_CALTECH_TRAIN, len(files) - 1)))
        for file in files:
            yield 'train' if file in chosen else 'test', name, os.path.join(folder, name, file)


def lay_out(files: Iterable[Tuple[str, str, str]], output: str) -> Dict[str, int]:
    """Copy files into folders. Returns the number of images of each split."""
    if os.path.exists(output):
        raise SystemExit(f'Expected no folder {output!r} yet. Remove it, or name another one.')
    counts: Dict[str, int] = {}
    for split, folder, path in files:
        target = os.path.join(output, split, folder)
        os.makedirs(target, exist_ok=True)
        shutil.copy2(path, target)
        counts[split] = counts.get(split, 0) + 1
    return counts


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=NAMES, help='data set')
    parser.add_argument('output', metavar='OUTPUT', help='folder to write, which must not exist')
    parser.add_argument('--root', required=True, metavar='DIR', help='folder that torchvision keeps its data sets in')
    parser.add_argument('--download', action='store_true', help='download the data set into --root')
    args = parser.parse_args(argv)
    try:
        files = list(find_files(args.name, args.root, args.download))
    except (OSError, RuntimeError, ValueError) as e:
        raise SystemExit(f'Expected the files of {args.name} in {args.root!r} as torchvision lays them: {e}') from e
    counts = lay_out(files, args.output)
    print(', '.join(f'{count} images in {os.path.join(args.output, split)}' for split, count in counts.items()))


if __name__ == '__main__':
    main()
