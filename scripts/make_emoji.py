#!/usr/bin/env python3
"""Lays out emoji as folders of classes: 32 subgroups of Unicode, drawn by three vendors.

Question answered: does a method carry what it learned over to pictures of another style, and to other things? Train on
the pictures of google and twitter, test on those of fluent (3D).

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python scripts/make_emoji.py --split vendor --output DIR --google emoji-datasource-google-16.0.0.tgz \
        --twitter emoji-datasource-twitter-16.0.0.tgz --fluent lobehub-fluent-emoji-3d-1.1.0.tgz

--split vendor tests on another vendor. --split concept tests on another vendor and on other things: 40 % of the things
of each class are tested on, and the rest is trained on. In both, val is 20 % of the things that are trained on, with
the pictures of both vendors. Choose settings on val, and use test once.

A thing is an emoji, whatever the gender of its person. Only emoji that all three vendors draw are used, without their
variants of skin tone. Flags are left out: they would be one fifth of all pictures, and some are identical. The classes
are the subgroups with the most things. The same packages and the same Pillow give the same bytes.
"""

import argparse
import logging
from typing import Dict, List

from emoji_packages import (
    DOWNLOAD,
    LICENCES,
    Emoji,
    add_package_arguments,
    assign_things,
    compose_on_white,
    get_class_name,
    group_things,
    list_pictures,
    open_rgba,
    read_emoji,
)
from picture_folders import create_output, save_png, write_readme
from PIL import Image

_logger = logging.getLogger('make_emoji')

LEFT_OUT = ('Flags',)
TEST_FRACTION = {'vendor': None, 'concept': 0.4}  # share of the things that only test has


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Lay out emoji of three vendors as folders of classes')
    add_package_arguments(parser)
    parser.add_argument('--split', required=True, choices=('vendor', 'concept'))
    parser.add_argument('--num-classes', type=int, default=32, metavar='N')
    parser.add_argument('--size', type=int, default=64, metavar='PIXELS', help='side of the pictures')
    parser.add_argument('--output', required=True, metavar='DIR', help='empty or new folder')
    return parser.parse_args()


def choose_classes(emoji: List[Emoji], num_classes: int) -> Dict[str, List[str]]:
    """Chooses the subgroups with the most things, in alphabetical order among those with as many."""
    things = group_things([item for item in emoji if item.category not in LEFT_OUT])
    if not 2 <= num_classes <= len(things):
        raise ValueError(
            f'Expected --num-classes in [2, {len(things)}], the subgroups that the packages have, got {num_classes}. '
            f'If these are fewer than you expect, get the packages anew: {DOWNLOAD}'
        )
    chosen = sorted(things, key=lambda name: (-len(things[name]), name))[:num_classes]
    return {name: things[name] for name in sorted(chosen)}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    args = parse_args()
    emoji, pictures = read_emoji(args)
    classes = choose_classes(emoji, args.num_classes)
    create_output(args.output)
    counts = dict.fromkeys(('train', 'val', 'test'), 0)
    for subgroup, things in classes.items():
        for split, vendor, code in list_pictures(emoji, subgroup, assign_things(things, TEST_FRACTION[args.split])):
            image = compose_on_white(open_rgba(pictures[vendor][code]))
            if image.size != (args.size, args.size):
                image = image.resize((args.size, args.size), Image.Resampling.LANCZOS)
            save_png(image, args.output, split, get_class_name(subgroup), f'{vendor}_{code}.png')
            counts[split] += 1
    write_readme(args.output, f'Emoji, {args.split} split, {args.num_classes} classes', counts, LICENCES)
    _logger.info(f'Wrote {args.output}: {counts}')


if __name__ == '__main__':
    main()
