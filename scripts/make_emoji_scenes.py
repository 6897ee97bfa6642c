#!/usr/bin/env python3
"""Draws scenes of emoji with masks, for segmentation: 8 classes and the background, 96 x 96 pixels.

Question answered: does a method of segmentation carry what it learned over to another style? Scenes of train and val
show pictures of google and twitter, those of test show pictures of fluent (3D).

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python scripts/make_emoji_scenes.py --output DIR --google emoji-datasource-google-16.0.0.tgz \
        --twitter emoji-datasource-twitter-16.0.0.tgz --fluent lobehub-fluent-emoji-3d-1.1.0.tgz
    accelerate launch train.py --segmentation --coretune --data-dir DIR --val-split val

A scene has 1 to 5 emoji of random class, size and place on the texture of the bundled scenes. Later emoji cover earlier
ones. Val shows 20 % of the things of each class, which train does not show. A pixel belongs to an emoji whose alpha is
at least 90 %, and is ignored (255) if the alpha is between 10 and 90 %, as at soft edges. The same packages, seed,
Pillow and NumPy give the same bytes.
"""

import argparse
import logging
import os
from collections import defaultdict
from typing import Dict, List, Sequence

import numpy as np
from emoji_packages import (
    LICENCES,
    Emoji,
    add_package_arguments,
    assign_things,
    get_class_name,
    group_things,
    list_pictures,
    open_rgba,
    read_emoji,
)
from picture_folders import create_output, save_png, write_readme
from PIL import Image

from timm_coretune.segmentation.data.masks import IGNORE_INDEX
from timm_coretune.segmentation.data.palette import write_mask
from timm_coretune.segmentation.data.scenes import SCENE_SIZE, draw_texture, draws_of

_logger = logging.getLogger('make_emoji_scenes')

SUBGROUPS = (
    'animal-mammal',
    'clothing',
    'face-concerned',
    'food-fruit',
    'person-role',
    'place-building',
    'sky & weather',
    'transport-ground',
)
EMOJI_SIZES = (24, 56)  # smallest and largest side, in pixels
MAX_EMOJI = 5
CLEAR, OPAQUE = 26, 230  # alpha of 255: below CLEAR the pixel is not of the emoji, from OPAQUE on it is


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Draw scenes of emoji with masks')
    add_package_arguments(parser)
    parser.add_argument(
        '--num-scenes', type=int, nargs=3, default=(400, 100, 200), metavar='N', help='scenes of train, val and test'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', required=True, metavar='DIR', help='empty or new folder')
    return parser.parse_args()


def open_members(emoji: Sequence[Emoji], pictures: Dict[str, Dict[str, bytes]]) -> Dict[str, List[List[Image.Image]]]:
    """Opens the pictures of each split, one list a class."""
    things = group_things(emoji)
    missing = [name for name in SUBGROUPS if len(things.get(name, ())) < 2]
    if missing:
        raise ValueError(f'Expected packages with at least 2 things of each class, got fewer of {", ".join(missing)}.')
    members = defaultdict(lambda: [[] for _ in SUBGROUPS])
    for label, subgroup in enumerate(SUBGROUPS):
        for split, vendor, code in list_pictures(emoji, subgroup, assign_things(things[subgroup])):
            members[split][label].append(open_rgba(pictures[vendor][code]))
    return members


def paste(scene: np.ndarray, mask: np.ndarray, image: Image.Image, label: int, top: int, left: int) -> None:
    """Puts an emoji on the scene (H, W, 3) and its class on the mask (H, W), in place."""
    pixels = np.asarray(image)
    alpha = pixels[..., 3]
    place = (slice(top, top + image.height), slice(left, left + image.width))
    opacity = alpha[..., None] / np.float32(255)
    scene[place] = scene[place] * (1 - opacity) + pixels[..., :3] * opacity
    mask[place][(alpha >= CLEAR) & (alpha < OPAQUE)] = IGNORE_INDEX
    mask[place][alpha >= OPAQUE] = label


def draw_scene(members: List[List[Image.Image]], draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    scene = draw_texture(draws)
    mask = np.zeros((SCENE_SIZE, SCENE_SIZE), np.uint8)
    for _ in range(draws.integers(1, MAX_EMOJI, endpoint=True)):
        label = int(draws.integers(len(members)))
        image = members[label][draws.integers(len(members[label]))]
        size = int(draws.integers(*EMOJI_SIZES, endpoint=True))
        top, left = draws.integers(0, SCENE_SIZE - size, size=2, endpoint=True)
        paste(scene, mask, image.resize((size, size), Image.Resampling.BILINEAR), label + 1, top, left)
    return scene.round().astype(np.uint8), mask


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    args = parse_args()
    members = open_members(*read_emoji(args))
    create_output(args.output)
    counts = dict(zip(('train', 'val', 'test'), args.num_scenes, strict=True))
    for split, count in counts.items():
        os.makedirs(os.path.join(args.output, split, 'masks'))
        for index in range(count):
            scene, mask = draw_scene(members[split], draws_of(args.seed, split, index))
            save_png(Image.fromarray(scene), args.output, split, 'images', f'{index:04d}.png')
            write_mask(mask, os.path.join(args.output, split, 'masks', f'{index:04d}.png'))
    with open(os.path.join(args.output, 'classes.txt'), 'w', encoding='utf-8') as file:
        file.write('\n'.join(['background', *map(get_class_name, SUBGROUPS), '']))
    title = f'Scenes of emoji with masks, {len(SUBGROUPS)} classes and the background, seed {args.seed}'
    write_readme(args.output, title, counts, LICENCES)
    _logger.info(f'Wrote {args.output}: {counts}')


if __name__ == '__main__':
    main()
