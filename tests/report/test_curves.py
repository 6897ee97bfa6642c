"""Curves show the columns of a summary: all of them, with losses apart, at the places of their values"""

import re

import numpy as np
import pytest
from report_page import Page

from timm_coretune.report.curves import arrange, draw_curves
from timm_coretune.report.plots import read_columns

SUMMARY = """epoch,train_loss,train_task,train_contrast,train_images_per_second,eval_loss,eval_top1,eval_ece,eval_knn,lr
0,2.5,1.0,1.5,310,0.9,70.0,4.0,60.0,0.1
1,2.0,0.8,1.2,320,0.7,80.0,,62.0,0.05
2,1.9,0.7,1.2,330,0.8,85.0,3.0,61.0,0.01
"""


@pytest.fixture(scope='module')
def columns(tmp_path_factory):
    path = tmp_path_factory.mktemp('run') / 'summary.csv'
    path.write_text(SUMMARY)
    return read_columns(path)


@pytest.fixture(scope='module')
def drawn(columns):
    return draw_curves(columns, best_epoch=1)


def test_losses_are_apart_and_every_column_is_in_one_chart(columns):
    panels = arrange(list(columns))
    shown = {panel.title: list(panel.columns.values()) for panel in panels}
    assert shown == {
        'Training loss, all parts': ['train_loss'],
        'Task loss': ['train_task', 'eval_loss'],
        'Contrastive loss': ['train_contrast'],
        'Scores of the validation': ['eval_top1', 'eval_ece'],
        'Images per second (training)': ['train_images_per_second'],
        'Knn (validation)': ['eval_knn'],
        'Learning rate': ['lr'],
    }
    assert [panel.unit for panel in panels] == ['nats', 'nats', 'nats', '%', '', '', '']


@pytest.mark.parametrize(
    'columns, alike',
    [
        (['epoch', 'train_loss', 'eval_loss', 'lr'], ['train_loss', 'eval_loss']),
        (['epoch', 'train_loss', 'train_task', 'train_dense', 'eval_loss', 'lr'], ['train_dense', 'eval_loss']),
    ],
)
def test_the_loss_of_the_validation_is_beside_what_it_is_comparable_with(columns, alike):
    assert alike in [list(panel.columns.values()) for panel in arrange(columns)]


def test_lines_go_through_the_values(columns, drawn):
    charts = drawn.split('<figure')[1:]
    assert len(charts) == 7
    for panel, chart in zip(arrange(list(columns)), charts, strict=True):
        lines = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--c\d\)', chart)
        assert len(lines) == len(panel.columns), panel.title
        found, expected = [], []
        for line, column in zip(lines, panel.columns.values(), strict=True):
            points = [(i, value) for i, value in enumerate(columns[column]) if value == value]
            found += [[float(n) for n in point] for point in re.findall(r'[ML] ([\d.]+) ([\d.]+)', line)]
            expected += points
        # places are values, scaled and shifted, and a chart has one scale for all its lines; y points down
        for axis, sign in ((0, 1), (1, -1)):
            places, values = np.array(found)[:, axis], np.array(expected, dtype=float)[:, axis]
            slope, shift = np.polyfit(values, places, 1)
            assert sign * slope > 0
            assert places == pytest.approx(slope * values + shift, abs=0.3)


def test_the_best_epoch_is_said_and_ticks_keep_their_digits(drawn):
    page = Page(drawn)
    text = page.sections['curves']
    assert 'Epochs 0 to 2 of' in text
    assert 'The dotted line marks epoch 1, whose weights were kept.' in text
    assert '0.02' in text  # a tick of the learning rate
    assert page.tables == {}


def test_the_font_is_that_of_the_page(drawn):
    styles = [attributes['style'] for tag, attributes in Page(drawn).elements if tag == 'text']
    assert len(styles) > 50
    assert [style for style in styles if 'font-size: ' not in style or 'DejaVu' in style] == []


def test_names_inside_the_charts_are_different_and_no_colour_is_fixed(drawn):
    names = [attributes['id'] for _, attributes in Page(drawn).elements if 'id' in attributes]
    assert len(names) > 10
    assert len(set(names)) == len(names)
    assert re.findall(r'(?<!url\()#[0-9a-f]{6}\b(?!")', drawn) == []


def test_figures_of_features_begin_before_the_run():
    columns = {'epoch': [-1.0, 0.0], 'train_loss': [float('nan'), 2.0], 'features_knn_top1': [50.0, 60.0]}
    drawn = draw_curves(columns, None)
    page = Page(drawn)
    text = ' '.join(page.sections['curves'].split())
    assert 'Epochs 0 to 0 of summary.csv . Epoch -1 is before the run.' in text
    titles = [panel.title for panel in arrange(list(columns))]
    assert titles == ['Training loss, all parts', 'kNN accuracy of the features, %']
    # a loss of one epoch is one point, the figure is there twice
    assert [len(re.findall('<use[^>]*var\\(--c0\\)', chart)) for chart in drawn.split('<figure')[1:]] == [1, 2]


def test_without_an_epoch_there_are_no_curves():
    assert Page(draw_curves({}, None)).sections['curves'].strip().endswith('so there are no curves.')
