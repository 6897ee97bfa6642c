"""Reads the npm packages of emoji pictures that make_emoji.py and make_emoji_scenes.py use"""

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from PIL import Image

DOWNLOAD = 'npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0'
PICTURES = {'google': 'img/google/64/*.png', 'twitter': 'img/twitter/64/*.png', 'fluent': 'assets/*.webp'}
TRAIN_VENDORS, TEST_VENDOR = ('google', 'twitter'), 'fluent'
VAL_FRACTION = 0.2  # of the things of a class that are trained on
LICENCES = """google: Noto Emoji, Google, Apache-2.0 (npm emoji-datasource-google)
twitter: Twemoji, Twitter, Inc and other contributors, CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/
    (npm emoji-datasource-twitter)
fluent: Fluent Emoji 3D, Microsoft, MIT (npm @lobehub/fluent-emoji-3d)
The pictures were changed: scaled, and composed on white or on a texture."""
# A man, a woman and a person are drawn alike in the rest of the picture, so they are one thing.
NEUTRAL = {'1f468': '1f9d1', '1f469': '1f9d1', '1f466': '1f9d2', '1f467': '1f9d2'}


class Emoji(NamedTuple):
    """One emoji, without variants of skin tone. `thing` is the same for those that differ in gender alone."""

    code: str
    thing: str
    category: str
    subgroup: str


def add_package_arguments(parser: argparse.ArgumentParser) -> None:
    for vendor in PICTURES:
        parser.add_argument(
            f'--{vendor}',
            required=True,
            metavar='FILE_OR_FOLDER',
            help=f'npm package with the pictures of {vendor}, as .tgz or unpacked',
        )


def normalize(name: str) -> str:
    """Writes a sequence of code points alike for all packages: without the variation selector and leading zeros."""
    return '-'.join(part.lstrip('0') for part in re.split('[-_]', name.lower()) if part != 'fe0f')


def get_thing(code: str) -> str:
    code = re.sub('-200d-(2640|2642)', '', code)
    return '-'.join(NEUTRAL.get(part, part) for part in code.split('-'))


def read_package(path: str, vendor: str) -> Tuple[List[dict], Dict[str, bytes]]:
    """Reads a package as .tgz or folder.

    Returns:
        The entries of emoji.json, none if the package has no such file, and the bytes of each picture by its code.
    """
    folder, pattern = os.path.split(PICTURES[vendor])
    wanted = re.compile(f'(?:package/)?(?:{folder}/([^/]+){re.escape(pattern[1:])}|(emoji.json))')
    if os.path.isdir(path):
        files = {file.relative_to(path).as_posix(): file for file in Path(path).rglob('*')}
        blobs = {name: file.read_bytes() for name, file in files.items() if wanted.fullmatch(name)}
    elif os.path.isfile(path) and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile() and wanted.fullmatch(member.name)]
            blobs = {member.name: archive.extractfile(member).read() for member in members}
    else:
        raise FileNotFoundError(
            f'Expected --{vendor} as .tgz or unpacked folder, got {path!r}. Get it with: {DOWNLOAD}'
        )
    entries, pictures = [], {}
    for name in sorted(blobs):
        match = wanted.fullmatch(name)
        if match[2]:
            entries = json.loads(blobs[name])
        else:
            pictures.setdefault(normalize(match[1]), blobs[name])
    if not pictures:
        raise ValueError(f'No pictures {PICTURES[vendor]} in {path!r}. Is it the package of {vendor}? {DOWNLOAD}')
    return entries, pictures


def read_emoji(args: argparse.Namespace) -> Tuple[List[Emoji], Dict[str, Dict[str, bytes]]]:
    """Reads all packages.

    Returns:
        The emoji that every vendor draws, in the order of their codes, and the pictures of each vendor by code.
    """
    pictures, entries = {}, []
    for vendor in PICTURES:
        found, pictures[vendor] = read_package(getattr(args, vendor), vendor)
        entries = entries or found
    if not entries:
        raise ValueError(f'No emoji.json in {args.google!r}. Expected a package emoji-datasource-*. {DOWNLOAD}')
    emoji = []
    for entry in entries:
        code = normalize(entry['unified'])
        if all(code in of_vendor for of_vendor in pictures.values()):
            emoji.append(Emoji(code, get_thing(code), entry['category'], entry['subcategory']))
    return sorted(emoji), pictures


def group_things(emoji: Sequence[Emoji]) -> Dict[str, List[str]]:
    """Lists the things of each subgroup."""
    things = defaultdict(set)
    for item in emoji:
        things[item.subgroup].add(item.thing)
    return {subgroup: sorted(members) for subgroup, members in things.items()}


def draw_share(things: Sequence[str], fraction: float, key: str) -> List[str]:
    """Draws a share of things by their hash, so that it depends on nothing but the things, the key and the fraction."""
    ordered = sorted(things, key=lambda thing: hashlib.sha256(f'{key}/{thing}'.encode()).digest())
    return ordered[: round(fraction * len(things))]


def assign_things(things: Sequence[str], test_fraction: Optional[float] = None) -> Dict[str, List[str]]:
    """Divides the things of a class among train, val and test.

    Args:
        things: All things of the class.
        test_fraction: Share of the things that only test has. When None test has all things, those of train too.
    """
    test = things if test_fraction is None else draw_share(things, test_fraction, 'test')
    seen = things if test_fraction is None else [thing for thing in things if thing not in test]
    val = draw_share(seen, VAL_FRACTION, 'val')
    return {'train': [thing for thing in seen if thing not in val], 'val': val, 'test': list(test)}


def list_pictures(
    emoji: Sequence[Emoji], subgroup: str, things: Dict[str, List[str]]
) -> Iterator[Tuple[str, str, str]]:
    """Lists split, vendor and code of every picture of a subgroup, from the things of each split."""
    for split, members in things.items():
        for vendor in (TEST_VENDOR,) if split == 'test' else TRAIN_VENDORS:
            for item in emoji:
                if item.subgroup == subgroup and item.thing in members:
                    yield split, vendor, item.code


def get_class_name(subgroup: str) -> str:
    """Writes the name of a subgroup so that a folder can have it, `sky & weather` as `sky-weather`."""
    return re.sub('[^a-z0-9]+', '-', subgroup)


def open_rgba(blob: bytes) -> Image.Image:
    return Image.open(io.BytesIO(blob)).convert('RGBA')


def compose_on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
