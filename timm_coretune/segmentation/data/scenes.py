"""Synthetic scenes to try segmentation without a download, and a writer of PASCAL VOC's folder layout"""

import hashlib
import os
from typing import Any, Iterable, Optional, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...atomic import write_text
from ...data.safetensors_images import find_splits, read_split
from .folders import TRAIN_SPLITS, Source, resolve_split
from .masks import IGNORE_INDEX, read_mask
from .palette import save_image, write_mask

SCENE_SIZE = 96
GARMENT_SIZES = (24, 64)  # smallest and largest side of a garment, in pixels
MAX_GARMENTS = 4
THRESHOLD = 32  # a pixel of at least this intensity, of 255, belongs to the garment
NUM_SCENES = (480, 120)  # of a training split, and of any other split


class FashionScenes:
    """Synthetic scenes: garments of Fashion-MNIST on drawn textures. Nothing here is a photograph.

    A scene shows one to four garments of the split. All classes are equally likely. Every garment is scaled, tinted and
    placed at random, and later garments cover earlier ones. The texture behind them is made of gratings and noise.
    Class 0 is the background, and a garment with label k has class k + 1. Between two regions one pixel is ignored, as
    in PASCAL VOC. A scene depends only on the file, the name of the split and the index of the scene.

    Args:
        path: A safetensors file with uint8 tensors `<split>.image` (N, H, W) and labels `<split>.label`.
        split: Name of the split, or a synonym such as `val` for `validation`.
        num_scenes: Number of scenes. When None 480 for a training split and 120 for any other.

    Raises:
        ValueError: The file cannot be read, has no such split, or its tensors have another dtype or shape.
    """

    ignore_index = IGNORE_INDEX

    def __init__(self, path: str, split: str, num_scenes: Optional[int] = None):
        self.split = resolve_split(split, find_splits(path), path)
        image, label, names = read_split(path, self.split)
        if image.ndim != 3:
            raise ValueError(
                f'Expected {self.split}.image as uint8 (N, H, W), that is grey garments, got {tuple(image.shape)} in '
                f'{path!r}.'
            )
        self.garments = image.numpy()
        self.path = path
        self.labels = np.unique(label.numpy())
        self.members = [np.flatnonzero(label.numpy() == value) for value in self.labels]
        self.class_names = ['background', *(names or map(str, range(int(self.labels.max()) + 1)))]
        self.num_scenes = NUM_SCENES[self.split not in TRAIN_SPLITS] if num_scenes is None else num_scenes

    def __len__(self) -> int:
        return self.num_scenes

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        if not 0 <= index < self.num_scenes:
            raise IndexError(
                f'Expected a scene in [0, {self.num_scenes - 1}], got {index}.'
            )  # iteration over a source ends with IndexError
        draws = draws_of(self.split, index)
        scene = draw_texture(draws)
        mask = np.zeros((SCENE_SIZE, SCENE_SIZE), np.uint8)
        region = np.zeros_like(mask)
        for number in range(1, draws.integers(1, MAX_GARMENTS, endpoint=True) + 1):
            kind = draws.integers(len(self.labels))
            size = int(draws.integers(*GARMENT_SIZES, endpoint=True))
            top, left = draws.integers(0, SCENE_SIZE - size, size=2, endpoint=True)
            tint = draws.uniform(0.3, 1.0, 3) * draws.uniform(0.6, 1.0)
            garment = Image.fromarray(self.garments[draws.choice(self.members[kind])])
            intensity = np.asarray(garment.resize((size, size), Image.Resampling.BILINEAR))
            covered = intensity >= THRESHOLD
            place = (slice(top, top + size), slice(left, left + size))
            scene[place][covered] = intensity[covered, None] * tint
            mask[place][covered] = self.labels[kind] + 1
            region[place][covered] = number
        mask[:, :-1][region[:, :-1] != region[:, 1:]] = IGNORE_INDEX
        mask[:-1][region[:-1] != region[1:]] = IGNORE_INDEX
        return Image.fromarray(scene.astype(np.uint8)), Image.fromarray(mask)

    def name(self, index: int) -> str:
        return f'{self.path} {self.split}[{index}]'


def draws_of(*key: Any) -> np.random.Generator:
    """Random numbers of the scene with this key, such as its split and index. They do not depend on other scenes."""
    digest = hashlib.blake2b(','.join(map(str, key)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, 'little'))


def draw_texture(draws: np.random.Generator) -> np.ndarray:
    """Draw three gratings of random direction, width and colour, and noise: (SCENE_SIZE, SCENE_SIZE, 3) in [0, 255]."""
    scene = np.empty((SCENE_SIZE, SCENE_SIZE, 3), np.float32)
    scene[:] = draws.uniform(60, 190, 3)
    place = np.arange(SCENE_SIZE, dtype=np.float32)
    for frequency in draws.uniform(-0.5, 0.5, (3, 2)).astype(np.float32):
        phase = place[:, None] * frequency[0] + place * frequency[1] + np.float32(draws.uniform(0, 2 * np.pi))
        scene += np.cos(phase)[..., None] * draws.uniform(-20, 20, 3).astype(np.float32)
    scene += draws.standard_normal((SCENE_SIZE, SCENE_SIZE, 1), dtype=np.float32) * 8
    return scene.clip(0, 255, out=scene)


def write_voc(source: Source, folder: str, split: str) -> None:
    """Write images and masks in the folder layout of PASCAL VOC, with the class names in classes.txt.

    The list of the images is written last, so that a split which was interrupted is not listed.

    Args:
        source: Images and masks to write.
        folder: Folder to write to, created if missing. Other splits in it stay as they are.
        split: Name to give the split.
    """
    images, masks = os.path.join(folder, 'JPEGImages'), os.path.join(folder, 'SegmentationClass')
    lists = os.path.join(folder, 'ImageSets', 'Segmentation')
    for path in (images, masks, lists):
        os.makedirs(path, exist_ok=True)
    stems = [f'{split}_{index:05d}' for index in range(len(source))]
    for index in tqdm(range(len(source)), desc=f'Write {split}', disable=None, leave=False, dynamic_ncols=True):
        image, mask = source.load(index)
        save_image(image.convert('RGB'), os.path.join(images, f'{stems[index]}.jpg'), format='JPEG', quality=95)
        write_mask(read_mask(mask, source.name(index), image.size), os.path.join(masks, f'{stems[index]}.png'))
    if source.class_names is not None:
        _write_lines(source.class_names, os.path.join(folder, 'classes.txt'))
    _write_lines(stems, os.path.join(lists, f'{split}.txt'))


def _write_lines(lines: Iterable[str], path: str) -> None:
    write_text(''.join(f'{line}\n' for line in lines), path)
