"""Letters and digits of fonts, drawn with the fonts that matplotlib brings"""

import math
import random
import shutil
from collections import Counter
from pathlib import Path

import make_letters
import matplotlib
import numpy as np
import pytest
from PIL import Image

FONTS = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
SPLITS = {
    'train': ['DejaVuSans.ttf', 'DejaVuSans-Bold.ttf'],
    'val': ['DejaVuSansMono.ttf'],
    'test': ['DejaVuSerif.ttf'],
}


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """A folder as of unpacked packages, one for each split."""
    for split, files in SPLITS.items():
        folder = tmp_path / 'fonts' / f'fonts-{split}ed' / 'usr' / 'share'
        folder.mkdir(parents=True)
        for file in files:
            shutil.copy(FONTS / file, folder)
    monkeypatch.setattr(make_letters, 'PACKAGES', {split: f'{split}ed' for split in SPLITS})
    monkeypatch.setattr(make_letters, 'CHARACTERS', 'AIW08')
    return tmp_path / 'fonts'


def test_each_split_has_its_own_packages_and_as_many_pictures_of_each_class(fonts, run_script, tmp_path):
    run_script(make_letters, '--fonts', fonts, '--output', tmp_path / 'out')
    files = [path.relative_to(tmp_path / 'out').parts for path in (tmp_path / 'out').rglob('*.png')]
    counts = Counter((split, character) for split, character, _ in files)
    expected = {'train': 6, 'val': 4, 'test': 3}
    assert counts == {(split, character): expected[split] for split in SPLITS for character in 'AIW08'}
    assert {(split, name.split('_')[0]) for split, _, name in files} == {(split, f'{split}ed') for split in SPLITS}
    image = Image.open(tmp_path / 'out' / 'test' / 'A' / 'tested_0.png')
    assert (image.mode, image.size) == ('L', (32, 32))


def test_the_seed_says_what_is_drawn(fonts, run_script, bytes_of, tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        run_script(make_letters, '--fonts', fonts, '--seed', seed, '--output', tmp_path / name)
    first, again, other = (bytes_of(tmp_path / name) for name in 'abc')
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_no_two_packages_of_the_splits_are_the_same(capsys, run_script):
    run_script(make_letters, '--list')
    listed = capsys.readouterr().out.split()
    assert len(listed) == len(set(listed)) == 48
    assert {'fonts-dejavu-core', 'fonts-hack', 'fonts-oxygen'} <= set(listed)


class Fixed(random.Random):
    """Draws the value at the same place of every interval."""

    def __init__(self, *places):
        super().__init__(0)
        self.places = list(places)

    def uniform(self, a, b):
        return a + (b - a) * self.places.pop(0)


def ink_of(character, angle=0.5, shear=0.5, across=0, down=0, right=0.5, below=0.5):
    """Bounding box, centre (x, y) and spread (yy, xy, xx) of the ink. Arguments are places in their intervals."""
    draws = Fixed(angle, shear, across, down, right, below)
    image = make_letters.draw_letter(str(FONTS / 'DejaVuSans.ttf'), character, draws)
    ink = 255 - np.asarray(image).astype(float)
    rows, columns = np.mgrid[:32, :32] + 0.5
    x, y = ((place * ink).sum() / ink.sum() for place in (columns, rows))
    spread = [
        (ink * a * b).sum() for a, b in ((rows - y, rows - y), (rows - y, columns - x), (columns - x, columns - x))
    ]
    return image.point(lambda value: 255 - value).getbbox(), (x, y), spread


def test_letters_have_the_height_and_the_place_that_were_drawn():
    (left, top, right, bottom), centre, (yy, xy, _) = ink_of('I')
    assert bottom - top == pytest.approx(22, abs=1)
    assert centre == pytest.approx((16, 16), abs=0.3)
    assert xy / yy == pytest.approx(0, abs=0.01)
    assert ink_of('I', right=1, below=0)[1] == pytest.approx((19, 13), abs=0.3)
    low = ink_of('I', down=1)[0]
    assert low[3] - low[1] == pytest.approx(22 / 1.4, abs=1)
    wide, narrow = ink_of('W')[0], ink_of('W', across=1)[0]
    assert (wide[2] - wide[0]) / (narrow[2] - narrow[0]) == pytest.approx(1.4, abs=0.15)


@pytest.mark.parametrize('place, sign', [(0, -1), (1, 1)])
def test_vertical_and_horizontal_strokes_turn_and_slant_as_drawn(place, sign):
    tangent = math.tan(math.radians(15))
    yy, xy, _ = ink_of('I', angle=place)[2]
    assert xy / yy == pytest.approx(sign * tangent, abs=0.03)
    _, xy, xx = ink_of('_', angle=place)[2]  # a rotation: the horizontal stroke turns with the vertical one
    assert xy / xx == pytest.approx(-sign * tangent, abs=0.03)
    yy, xy, _ = ink_of('I', shear=place)[2]
    assert xy / yy == pytest.approx(-sign * 0.2, abs=0.03)
    _, xy, xx = ink_of('_', shear=place)[2]  # a shear: it does not
    assert xy / xx == pytest.approx(0, abs=0.01)


def test_fonts_without_letters_are_left_out_and_none_is_an_error(fonts, run_script, tmp_path, caplog):
    shutil.copy(FONTS / 'DejaVuSansDisplay.ttf', fonts / 'fonts-valed')  # it has a few symbols
    run_script(make_letters, '--fonts', fonts, '--output', tmp_path / 'out')
    assert 'fonts-valed: 1 fonts lack characters and are left out' in caplog.text
    shutil.rmtree(fonts / 'fonts-valed' / 'usr')
    for wrong in (fonts, tmp_path / 'nowhere'):
        with pytest.raises(FileNotFoundError, match=r'Expected fonts of fonts-(val|train)ed in .* the commands'):
            run_script(make_letters, '--fonts', wrong, '--output', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    with pytest.raises(SystemExit):
        run_script(make_letters, '--fonts', fonts)


def test_a_font_that_draws_all_letters_alike_is_left_out(monkeypatch):
    class OneBox:
        def getmask(self, text):
            return [255, 0, 255] if text.isascii() else [0, 255]

    monkeypatch.setattr(make_letters, 'load_font', lambda file, size: OneBox())
    assert not make_letters.draws_all('font.ttf')
