"""Writes images and masks to a folder that train.py reads: all of them at once, or nothing"""

import logging
import os
import re
import shutil
import sys
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, Dict, List, NamedTuple, Sequence, Union

import numpy as np
from tqdm import tqdm

from ...atomic import publish, write_text, write_whole
from ...checks import shorten
from ..data.dataset import MAX_CLASSES, read_class_names
from ..data.palette import write_mask

_logger = logging.getLogger(__name__)

CLASSES_NAME = 'classes.txt'
KINDS = ('images', 'masks')


class Sample(NamedTuple):
    """An image with its mask.

    Attributes:
        stem: Name of both files in the new folder, without ending.
        ending: Ending of the file of the image.
        image: File of the image, or its bytes.
        draw: Draws the mask: class indices uint8 (H, W), 255 for pixels to leave out.
    """

    stem: str
    ending: str
    image: Union[str, bytes]
    draw: Callable[[], np.ndarray]


@dataclass
class Conversion:
    """What is to be written.

    Attributes:
        splits: Images with masks by the name of their split, '' for a folder without splits.
        class_names: Names of the classes by index.
        inputs: Files and folders that are read.
        has_instances: Whether annotations are objects, not masks of whole images.
        drawn: Number of instances in each mask, by split and stem. Drawing a mask adds to it.
        left_out: Number of instances, images or masks by the reason why they were left out. Drawing a mask adds to it.
    """

    splits: Dict[str, Sequence[Sample]]
    class_names: List[str]
    inputs: List[str]
    has_instances: bool = False
    drawn: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """What was written, in lines."""
        lines = []
        for split, samples in self.splits.items():
            line = f'{split or "all"}: {len(samples)} images and masks'
            if self.has_instances:
                empty = sum(self.drawn[f'{split}/{sample.stem}'] == 0 for sample in samples)
                line += f', {empty} of them without an instance'
            lines.append(line)
        if self.has_instances:
            lines.append(f'instances: {self.drawn.total()} drawn')
        lines += [f'left out: {count} {reason}' for reason, count in sorted(self.left_out.items())]
        return '\n'.join([*lines, f'classes: {len(self.class_names)}, in {CLASSES_NAME}: {shorten(self.class_names)}'])


def clean_names(names: Sequence[str], where: str) -> List[str]:
    """Names of classes as lines of classes.txt: each on one line, without control characters.

    Raises:
        ValueError: A name is empty, or there are too many.
    """
    cleaned = [' '.join(''.join(c if c.isprintable() else ' ' for c in name).split()) for name in names]
    if '' in cleaned:
        raise ValueError(f'Expected a name for each class in {where}, got an empty one.')
    if len(cleaned) > MAX_CLASSES:
        raise ValueError(
            f'Expected at most {MAX_CLASSES} classes, with the background, got {len(cleaned)} in {where}. A mask has '
            'one byte a pixel.'
        )
    return cleaned


def check_split(split: str) -> str:
    """Check the name of a split, which becomes a folder.

    Raises:
        ValueError: It is no name for one.
    """
    if split and (not re.fullmatch(r'\w[\w.-]*', split) or split in KINDS):
        raise ValueError(f'Expected a split such as train or val, of letters, digits, -, _ and ., got {split!r}.')
    return split


def flat_stem(name: str) -> str:
    """Name of an image and its mask in one folder, from the path of the image within its own."""
    return os.path.splitext(name.replace('\\', '/'))[0].replace('/', '_')


def write(conversion: Conversion, output: str, overwrite: bool = False, hard_link: bool = False) -> None:
    """Write a conversion to a folder. It appears there when it is complete.

    Args:
        conversion: What to write.
        output: Folder to write to, created if missing. Other splits in it stay as they are.
        overwrite: Replace a split that is there.
        hard_link: Give the files of images a second name in place of copying them.

    Raises:
        ValueError: There is something already, or an image or a mask cannot be written.
    """
    output = os.path.realpath(output)
    entries = [entry for split in conversion.splits for entry in ([split] if split else KINDS)]
    _check_output(conversion, output, entries, overwrite)
    for split, samples in conversion.splits.items():
        seen: Dict[str, Sample] = {}
        for sample in samples:
            if seen.setdefault(sample.stem, sample) is not sample:
                raise ValueError(
                    f'Expected images of different names, two of them would both be called {sample.stem!r}. Rename one.'
                )
        if not samples:
            raise ValueError(f'Expected images with annotations{f" in {split}" if split else ""}, found none.')
    name = os.path.basename(output)
    staging = os.path.join(os.path.dirname(output), f'.{name[:100]}.{uuid.uuid4().hex[:8]}.tmp')
    os.makedirs(staging)
    try:
        for split, samples in conversion.splits.items():
            _write_split(samples, os.path.join(staging, split), split, hard_link)
        write_text(''.join(f'{name}\n' for name in conversion.class_names), os.path.join(staging, CLASSES_NAME))
        publish(staging, output, [*entries, CLASSES_NAME])
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_output(conversion: Conversion, output: str, entries: Sequence[str], overwrite: bool) -> None:
    """Refuse to write over what is there, over what is read, and beside splits that have other classes."""
    if os.path.lexists(output) and not os.path.isdir(output):
        raise ValueError(f'Expected a folder to write to, got the file {output!r}.')
    for path in map(os.path.realpath, conversion.inputs):
        for target in (os.path.join(output, entry) for entry in entries):
            if path == target or path.startswith(target + os.sep):
                raise ValueError(f'Expected a folder other than {path!r}, which is read. Choose another --output.')
    present = [entry for entry in entries if os.path.lexists(os.path.join(output, entry))]
    if present and not overwrite:
        raise ValueError(
            f'Expected no {" and no ".join(present)} in {output!r}, as nothing there is overwritten. Choose another '
            '--output or --split, or give --overwrite.'
        )
    names = os.listdir(output) if os.path.isdir(output) else []
    others = [name for name in names if name not in entries and os.path.isdir(os.path.join(output, name, 'masks'))]
    others += [name for name in KINDS if name in names and name not in entries]
    if any((name in KINDS) != (others[0] in KINDS) for name in [*others, *entries] if others):
        raise ValueError(
            f'Expected splits alone in {output!r}, or images without splits alone, got {shorten(others)} beside '
            f'{shorten(entries)}. Give each conversion to this folder a --split.'
        )
    known = read_class_names(output)
    if known is not None and known != conversion.class_names and (others or not overwrite):
        raise ValueError(
            f'Expected the classes that {os.path.join(output, CLASSES_NAME)!r} lists, {shorten(known)}, got '
            f'{shorten(conversion.class_names)}. The same number must mean the same class in all splits.'
        )


def _write_split(samples: Sequence[Sample], folder: str, split: str, hard_link: bool) -> None:
    images, masks = (os.path.join(folder, kind) for kind in KINDS)
    os.makedirs(images)
    os.makedirs(masks)
    for sample in tqdm(samples, f'Write {split or "masks"}', disable=not sys.stderr.isatty(), leave=False):
        path = os.path.join(images, sample.stem + sample.ending)
        if hard_link and isinstance(sample.image, str):
            try:
                os.link(os.path.realpath(sample.image), path)
            except OSError as e:
                raise ValueError(
                    f'Expected to give {sample.image!r} a second name in {folder!r}: {e.strerror}. Leave --hard-link '
                    'out to copy the images.'
                ) from e
        else:
            with write_whole(path) as temporary:
                if isinstance(sample.image, str):
                    shutil.copyfile(sample.image, temporary)
                else:
                    with open(temporary, 'wb') as f:
                        f.write(sample.image)
        write_mask(sample.draw(), os.path.join(masks, f'{sample.stem}.png'))
