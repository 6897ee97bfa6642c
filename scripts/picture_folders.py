"""Writes folders of pictures: what the scripts that lay out data sets share"""

import os
from typing import Dict

from PIL import Image


def create_output(folder: str) -> None:
    """Creates the folder. One that has files already is refused, since old and new pictures would mix."""
    if os.path.isdir(folder) and os.listdir(folder):
        raise FileExistsError(f'Expected an empty or new folder, but {folder!r} has files. Remove it, or name another.')
    os.makedirs(folder, exist_ok=True)


def save_png(image: Image.Image, *path: str) -> None:
    file = os.path.join(*path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    image.save(file, optimize=False)


def write_readme(folder: str, title: str, counts: Dict[str, int], text: str) -> None:
    """Writes README.txt, as the last file of a folder, so that a folder with it is complete."""
    lines = [title, '', *(f'{split}: {count} pictures' for split, count in counts.items()), '', text, '']
    with open(os.path.join(folder, 'README.txt'), 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines))
