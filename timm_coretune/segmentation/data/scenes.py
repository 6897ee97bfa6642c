"""Made scenes to try segmentation on without a download, and any source as a folder in VOC's layout"""

import hashlib
import json
import os
from typing import Any, Optional, Tuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ...atomic import write_text
from .folders import TRAIN_SPLITS, Source, resolve_split
from .masks import IGNORE_INDEX, read_mask
from .palette import save_image, write_mask

SCENE_SIZE = 96
GARMENT_SIZES = (24, 64)  # pixels, smallest and largest
MAX_GARMENTS = 4
THRESHOLD = 32  # intensity from which on a pixel belongs to a garment, of 255
NUM_SCENES = (480, 120)  # for training, and for anything else


class FashionScenes:
    """Made scenes: garments of Fashion-MNIST on made textures. Nothing here is a photograph.

    One to four garments of the split, each class as likely as any other, lie scaled and tinted at random on gratings
    and noise, later ones over earlier ones. Class 0 is the background, garments of label k have class k + 1, and one
    pixel between any two of these regions is ignored, as in VOC. Scene i of a split depends on nothing but the split,
    i, and the file.

    Args:
        path: A safetensors file with uint8 tensors `<split>.image` (N, H, W) and labels `<split>.label`.
        split: Name of the split, or a synonym.
        num_scenes: Scenes of the split, None for the usual number.

    Raises:
        ValueError: The file cannot be read, has no such split, or its tensors are of another kind.
    """

    def __init__(self, path: str, split: str, num_scenes: Optional[int] = None):
        try:
            with safe_open(path, framework='np') as f:
                keys = set(f.keys())
                splits = {key.removesuffix('.label') for key in keys if f'{key.removesuffix(".label")}.image' in keys}
                self.split = resolve_split(split, splits, path)
                self.garments = f.get_tensor(f'{self.split}.image')
                label = f.get_tensor(f'{self.split}.label')
                names = json.loads((f.metadata() or {}).get('class_names', 'null'))
        except (OSError, SafetensorError) as e:
            raise ValueError(f'Expected a safetensors file of images and labels, could not read {path!r}: {e}') from e
        if self.garments.dtype != np.uint8 or self.garments.ndim != 3 or label.shape != self.garments.shape[:1]:
            raise ValueError(
                f'Expected {self.split}.image as uint8 (N, H, W) with a label each in {path!r}, got '
                f'{self.garments.dtype} {self.garments.shape} and labels {label.shape}.'
            )
        self.path = path
        self.labels = np.unique(label)
        self.members = [np.flatnonzero(label == value) for value in self.labels]
        self.class_names = ['background', *(map(str, names or range(int(label.max()) + 1)))]
        self.num_scenes = NUM_SCENES[self.split not in TRAIN_SPLITS] if num_scenes is None else num_scenes

    def __len__(self) -> int:
        return self.num_scenes

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f'Expected a scene in [0, {self.num_scenes - 1}], got {index}.')  # ends an iteration
        digest = hashlib.blake2b(f'{self.split},{index}'.encode(), digest_size=8).digest()
        draws = np.random.default_rng(int.from_bytes(digest, 'little'))
        scene = _texture(draws)
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


def _texture(draws: np.random.Generator) -> np.ndarray:
    """Three gratings of random direction, width and colour, and noise, in [0, 255] (SCENE_SIZE, SCENE_SIZE, 3)."""
    scene = np.empty((SCENE_SIZE, SCENE_SIZE, 3), np.float32)
    scene[:] = draws.uniform(60, 190, 3)
    place = np.arange(SCENE_SIZE, dtype=np.float32)
    for frequency in draws.uniform(-0.5, 0.5, (3, 2)).astype(np.float32):
        phase = place[:, None] * frequency[0] + place * frequency[1] + np.float32(draws.uniform(0, 2 * np.pi))
        scene += np.cos(phase)[..., None] * draws.uniform(-20, 20, 3).astype(np.float32)
    scene += draws.standard_normal((SCENE_SIZE, SCENE_SIZE, 1), dtype=np.float32) * 8
    return scene.clip(0, 255, out=scene)


def write_voc(source: Source, folder: str, split: str) -> None:
    """Write a source in VOC's layout, with its class names in classes.txt. The list of the split comes last.

    Args:
        source: Images and masks.
        folder: Where to, made if missing. Other splits in it stay.
        split: What to call the split.
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


def _write_lines(lines: Any, path: str) -> None:
    write_text(''.join(f'{line}\n' for line in lines), path)
