#!/usr/bin/env python3
"""Draws letters and digits of free fonts as folders of classes: 36 classes, 32 x 32 pixels, grey.

Question answered: does a method carry what it learned over to fonts that it has not seen? The fonts of train, val and
test are those of different Debian packages, listed in PACKAGES. The packages are unpacked to a folder, not installed:

    apt-get update
    apt-get download $(python scripts/make_letters.py --list)
    for deb in *.deb; do dpkg -x $deb fonts/$(dpkg-deb -f $deb Package); done
    python scripts/make_letters.py --fonts fonts --output DIR

The classes are A to Z and 0 to 9. In many fonts O and 0 can hardly be told apart, nor can I and 1 in some, so that no
model classifies all pictures. Each package has the same number of pictures of each class: 6 in train, 4 in val and 3 in
test. A picture has a random font of the package, and is rotated, sheared, scaled and shifted a little at random. The
same packages, seed and Pillow give the same bytes.
"""

import argparse
import logging
import math
import os
import random
import string
from typing import Dict, List

from picture_folders import create_output, save_png, write_readme
from PIL import Image, ImageDraw, ImageFont

_logger = logging.getLogger('make_letters')

CHARACTERS = string.ascii_uppercase + string.digits
PACKAGES = {  # names without `fonts-` in front
    'train': """
        adf-mekanus bebas-neue breip cabin cabinsketch cantarell cherrybomb comfortaa courier-prime dejavu-core
        ebgaramond essays1743 fanwood femkeklaver gnutypewriter goudybookletter kaushanscript liberation lobster ocr-a
        quicksand roadgeek rufscript tuffy
    """,
    'val': 'bajaderka dancingscript dkg-handwriting hack jura lindenhill staypuft yanone-kaffeesatz',
    'test': """
        anonymous-pro beteckna blankenburg ecolier-court eurofurence gfs-didot havana isabella kristi league-spartan
        ocr-b oldstandard oxygen prociono sjfonts tomsontalks
    """,
}
PER_PACKAGE = {'train': 6, 'val': 4, 'test': 3}  # pictures of a class
SIDE = 32
HEIGHT = 22  # of the letter before it is scaled, in pixels
OVERSAMPLE = 4  # letters are drawn this many times as large
MAX_ANGLE, MAX_SHEAR, MAX_SHRINK, MAX_SHIFT = 15, 0.2, 0.4, 3  # degrees, ratio, ratio, pixels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Draw letters and digits of free fonts as folders of classes')
    parser.add_argument('--list', action='store_true', help='print the names of the Debian packages, and stop')
    parser.add_argument('--fonts', metavar='DIR', help='folder with one folder for each package')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', metavar='DIR', help='empty or new folder')
    args = parser.parse_args()
    if not args.list and not (args.fonts and args.output):
        parser.error('Expected --fonts DIR and --output DIR, or --list.')
    return args


def find_fonts(folder: str, package: str) -> List[str]:
    """Lists the font files of a package that draw every character, in alphabetical order."""
    root = os.path.join(folder, f'fonts-{package}')
    files = [os.path.join(where, name) for where, _, names in os.walk(root) for name in names]
    fonts = sorted(file for file in files if file.lower().endswith(('.ttf', '.otf')) and not os.path.islink(file))
    complete = [file for file in fonts if draws_all(file)]
    if not complete:
        raise FileNotFoundError(
            f'Expected fonts of fonts-{package} in {root!r}, got {len(fonts)} files .ttf or .otf, of which none draws '
            'A to Z and 0 to 9. The docstring of this script has the commands that get and unpack the packages.'
        )
    if len(complete) < len(fonts):
        _logger.warning(f'fonts-{package}: {len(fonts) - len(complete)} fonts lack characters and are left out')
    return complete


def load_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    # The other layout depends on libraries that not every Pillow has.
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def draws_all(file: str) -> bool:
    """Whether no character is empty or looks like the sign for a missing one, and not many look like each other."""
    font = load_font(file, 32)
    missing = bytes(font.getmask('\U0010fffd'))
    glyphs = [bytes(font.getmask(character)) for character in CHARACTERS]
    # O and 0, and I and 1, may be the same
    return all(any(glyph) and glyph != missing for glyph in glyphs) and len(set(glyphs)) >= len(glyphs) - 2


def draw_letter(file: str, character: str, draws: random.Random) -> Image.Image:
    """Draws a character in black on white, centred and then moved by a random affine map."""
    side = SIDE * OVERSAMPLE
    # Every font gets letters of the same height, whatever it calls its size
    top, bottom = load_font(file, 100).getbbox('H')[1::2]
    font = load_font(file, round(100 * HEIGHT * OVERSAMPLE / (bottom - top)))
    image = Image.new('L', (side, side), 255)
    left, top, right, bottom = font.getbbox(character)
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, font=font, fill=0)

    angle = math.radians(draws.uniform(-MAX_ANGLE, MAX_ANGLE))
    shear = draws.uniform(-MAX_SHEAR, MAX_SHEAR)
    # The map goes from the result to the drawing, so factors above 1 make the letter smaller, and it stays inside.
    across, down = (draws.uniform(1, 1 + MAX_SHRINK) for _ in range(2))
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = across * cos, across * (shear * cos - sin), down * sin, down * (shear * sin + cos)
    x, y = (side / 2 + OVERSAMPLE * draws.uniform(-MAX_SHIFT, MAX_SHIFT) for _ in range(2))
    affine = (a, b, side / 2 - a * x - b * y, d, e, side / 2 - d * x - e * y)
    image = image.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=255)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    args = parse_args()
    if args.list:
        print(' '.join(f'fonts-{package}' for names in PACKAGES.values() for package in names.split()))
        return
    fonts: Dict[str, List[str]] = {
        package: find_fonts(args.fonts, package) for names in PACKAGES.values() for package in names.split()
    }
    create_output(args.output)
    counts = dict.fromkeys(PACKAGES, 0)
    for split, names in PACKAGES.items():
        for package in names.split():
            for character in CHARACTERS:
                for number in range(PER_PACKAGE[split]):
                    draws = random.Random(f'{args.seed}/{package}/{character}/{number}')
                    image = draw_letter(draws.choice(fonts[package]), character, draws)
                    save_png(image, args.output, split, character, f'{package}_{number}.png')
                    counts[split] += 1
    licences = 'Drawn with fonts of Debian main. Their licences are in usr/share/doc/*/copyright of each package.'
    write_readme(args.output, f'Letters and digits, {len(CHARACTERS)} classes, seed {args.seed}', counts, licences)
    _logger.info(f'Wrote {args.output}: {counts}')


if __name__ == '__main__':
    main()
