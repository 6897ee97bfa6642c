"""The picture of a run shows its columns, and is whole or absent"""

import builtins

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from timm_coretune.report.plots import plot_curves, plot_segmentation, read_columns

SUMMARY = 'epoch,train_loss,train_contrast,eval_loss,eval_top1,lr\n0,2.5,1.5,0.9,70.0,0.1\n1,2.0,1.2,0.7,80.0,0.05\n'


def test_columns_are_read_as_numbers(tmp_path):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    columns = read_columns(tmp_path / 'summary.csv')
    assert columns['eval_top1'] == [70.0, 80.0]
    assert columns['epoch'] == [0.0, 1.0]


def test_the_picture_has_curves_in_it(tmp_path):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.format == 'PNG'
        colors = {color for _, color in image.convert('RGB').getcolors(1 << 20)}
    assert (31, 119, 180) in colors  # matplotlib's first line
    assert [path.name for path in tmp_path.glob('curves*')] == ['curves.png']


def test_a_summary_without_epochs_is_an_error(tmp_path):
    (tmp_path / 'summary.csv').write_text('epoch,lr\n')
    with pytest.raises(ValueError, match='at least one epoch'):
        plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')


def test_scores_of_a_segmentation_are_drawn_as_percentages(tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def remember(axes, *args, **kwargs):
        drawn.setdefault(axes, []).append(kwargs.get('label'))
        return plot(axes, *args, **kwargs)

    monkeypatch.setattr(Axes, 'plot', remember)
    (tmp_path / 'summary.csv').write_text(
        'epoch,train_loss,eval_loss,eval_pa,eval_mpa,eval_miou,eval_fwiou,lr\n0,2,1,90,80,70,85,0.1\n'
    )
    plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')
    by_title = {axes.get_title(): labels for axes, labels in drawn.items()}
    assert by_title['accuracy (%)'] == [f'validation {name}' for name in ('pa', 'mpa', 'miou', 'fwiou')]
    assert by_title['loss (nats)'] == ['train loss', 'validation loss']


RED, GREEN, BLUE, YELLOW, PINK = (200, 10, 10), (10, 180, 10), (10, 10, 220), (230, 220, 10), (255, 0, 200)
PALETTE = [v for color in (RED, GREEN, BLUE, YELLOW, PINK) for v in color] + [0] * (768 - 15)


def colors_of(path):
    with Image.open(path) as picture:
        assert picture.format == 'PNG'
        return {color: count for count, color in picture.convert('RGB').getcolors(1 << 20)}


@pytest.mark.parametrize('dtype', ['float', 'uint8'])
def test_masks_are_drawn_in_the_colors_of_their_classes(tmp_path, dtype):
    image = torch.full((3, 40, 60), 0.2)
    image[0] = 0.6
    image = image if dtype == 'float' else (255 * image).round().byte()
    truth = torch.zeros(40, 60).long()
    truth[:, 30:] = 1
    truth[:8] = 255
    # a checkerboard, of which nothing but the nearest color is left pure
    prediction = (3 * ((torch.arange(40)[:, None] + torch.arange(60)) % 2)).byte()
    path = tmp_path / 'segmentation.png'
    plot_segmentation([image] * 2, [truth] * 2, [prediction] * 2, PALETTE, ['ant', 'bee'], path)
    colors = colors_of(path)
    assert {(153, 51, 51), RED, GREEN, YELLOW} <= set(colors)
    assert colors[(128, 128, 128)] > 1000  # more than the edges of letters: stripes of what is ignored
    assert not {BLUE, PINK} & set(colors)  # classes that do not occur
    # areas, measured in images: half of the prediction, and half of the 4/5 of the truth that are not ignored
    assert colors[YELLOW] == pytest.approx(colors[(153, 51, 51)] / 2, rel=0.1)
    assert colors[GREEN] == pytest.approx(0.4 * colors[(153, 51, 51)], rel=0.1)
    assert colors[RED] == pytest.approx(0.9 * colors[(153, 51, 51)], rel=0.1)
    assert [file.name for file in tmp_path.iterdir()] == ['segmentation.png']


def test_the_legend_names_what_occurs(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(
        'matplotlib.figure.Figure.legend', lambda self, handles, **_: named.extend(h.get_label() for h in handles)
    )
    truth = torch.tensor([[0, 255], [4, 4]])
    path = tmp_path / 'segmentation.png'
    plot_segmentation([torch.rand(3, 2, 2)], [truth], [truth.where(truth != 255, 2)], PALETTE, ['ant', 'bee'], path)
    assert named == ['ant', '2', '4', 'ignored']
    named.clear()
    plot_segmentation([torch.rand(3, 2, 2)], [truth], [truth], PALETTE, None, path, ignore_index=4)
    assert named == ['0', 'ignored', '255']


def test_masks_of_many_classes_and_other_sizes_leave_room_for_the_pictures(tmp_path):
    palette = [v for c in range(256) for v in (c, 255 - c, 40)]
    sizes = ((30, 50), (50, 30))
    images = [torch.full((3, *size), 0.7) for size in sizes]
    masks = [torch.arange(1500).reshape(size) % 200 for size in sizes]
    plot_segmentation(images, masks, masks, palette, None, tmp_path / 'segmentation.png')
    colors = colors_of(tmp_path / 'segmentation.png')
    assert colors[(178, 178, 178)] > 30000


@pytest.mark.parametrize('images, palette', [([], PALETTE), ([torch.zeros(3, 2, 2)], PALETTE[:15])])
def test_a_picture_of_nothing_or_of_a_short_palette_is_refused(tmp_path, images, palette):
    masks = [torch.zeros(2, 2).long()] * len(images)
    with pytest.raises(ValueError, match='at least one image and a palette of 256 x 3'):
        plot_segmentation(images, masks, masks, palette, None, tmp_path / 'segmentation.png')


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_matplotlib)
    with pytest.raises(ImportError, match=r'timm-coretune\[vis\]'):
        plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')
    mask = torch.zeros(2, 2).long()
    with pytest.raises(ImportError, match=r'timm-coretune\[vis\]'):
        plot_segmentation([torch.zeros(3, 2, 2)], [mask], [mask], PALETTE, None, tmp_path / 'segmentation.png')
