"""Labels in pictures fit, differ, and are in a font that has their letters"""

import csv

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure

from timm_coretune.report import labels
from timm_coretune.report.labels import create_labels
from timm_coretune.report.plots import plot_confusion, plot_segmentation

CAT, DOG, BIRD = '猫', '犬', '새'


def write_font(path, letters):
    """A font with one square as the glyph of each letter."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    names = ['.notdef', *(f'uni{ord(letter):04X}' for letter in letters)]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({'familyName': 'Squares', 'styleName': 'Regular'})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def fonts(monkeypatch):
    """The fonts that matplotlib brings, of which none has East Asian letters, in a list that may be added to."""
    manager = font_manager.fontManager
    own = [font for font in manager.ttflist if 'matplotlib' in font.fname]
    monkeypatch.setattr(manager, 'ttflist', own)
    return own


def write_matrix(folder, names):
    path = folder / 'confusion.csv'
    with open(path, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows(
            [['', *names], *([name, *(9 * (i == j) + 1 for j in range(len(names)))] for i, name in enumerate(names))]
        )
    return path


def drawn(monkeypatch, plot, *args):
    """The figure that a function saves."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    plot(*args)
    return figures[-1]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('names', [['x' * 200, 'y' * 200], ['cat', 'z' * 200], [f'{i}' * 90 for i in range(30)]])
def test_long_names_leave_room_for_the_matrix(tmp_path, monkeypatch, names):
    figure = drawn(monkeypatch, plot_confusion, write_matrix(tmp_path, names), tmp_path / 'confusion.png')
    width, height = figure.get_size_inches()
    box = figure.axes[0].get_position()
    assert min(box.width * width, box.height * height) > 1.5  # inches
    assert max(len(text.get_text()) for text in figure.axes[0].get_xticklabels()) <= 32  # with an index in front


@pytest.mark.filterwarnings('error')
def test_names_are_drawn_as_they_are(tmp_path, monkeypatch, fonts):
    names = ['_hidden', '$\\frac{a}', 'a$b$', 'ünïcödé', 'a\nb']
    figure = drawn(monkeypatch, plot_confusion, write_matrix(tmp_path, names), tmp_path / 'confusion.png')
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert shown == [' _hidden', '$\\frac{a}', 'a$b$', 'ünïcödé', 'a b']
    mask = torch.arange(5).reshape(1, 5)
    palette = [c for i in range(256) for c in (i, 255 - i, 0)]
    arguments = ([torch.rand(3, 1, 5)], [mask], [mask], palette, names, tmp_path / 'segmentation.png')
    figure = drawn(monkeypatch, plot_segmentation, *arguments)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == shown


@pytest.mark.filterwarnings('error')
def test_letters_that_no_font_has_become_numbers_which_is_said(tmp_path, monkeypatch, fonts, messages):
    path = write_matrix(tmp_path, ['ant', CAT, DOG, f'{BIRD}!'])
    figure = drawn(monkeypatch, plot_confusion, path, tmp_path / 'confusion.png')
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ['ant', '1', '2', '3']
    (warning,) = messages('WARNING')
    assert f'3 of 4 class names, so pictures have the numbers of these classes: 1 is {CAT}, 2 is {DOG}' in warning


@pytest.mark.filterwarnings('error')
def test_an_installed_font_that_has_the_letters_is_used(tmp_path, monkeypatch, fonts, messages):
    path = write_font(tmp_path / 'squares.ttf', CAT + DOG)
    fonts.append(font_manager.ttfFontProperty(font_manager.get_font(path)))
    names, families = create_labels(['ant', CAT, f'{DOG}x', BIRD])
    assert names == ['ant', CAT, f'{DOG}x', '3']
    assert families[1:] == ['Squares']
    assert len(messages('WARNING')) == 1
    figure = drawn(
        monkeypatch, plot_confusion, write_matrix(tmp_path, ['ant', CAT, DOG]), tmp_path / 'confusion.png'
    )  # matplotlib would warn of a missing glyph
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ['ant', CAT, DOG]


def test_a_font_of_placeholders_has_no_letters(fonts):
    names = [font.name for font in fonts if font.name.lower().startswith(labels._PLACEHOLDERS)]
    assert create_labels([CAT])[0] == ['0'], names


def test_shortened_names_differ():
    long = [f'{"a" * 40}{i}{"b" * 40}' for i in range(3)]
    names, _ = create_labels([*long, 'short', 'e' * 40 + 'end'])
    assert len(set(names)) == 5
    assert names[0].startswith('0: aaa')
    assert names[3] == 'short'
    assert names[4].endswith('end')
