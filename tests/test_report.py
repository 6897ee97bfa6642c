"""The picture of a run shows its columns, and is whole or absent"""

import builtins

import pytest
from PIL import Image

from timm_coretune.report import plot_curves, read_summary

SUMMARY = 'epoch,train_loss,train_contrast,eval_loss,eval_top1,lr\n0,2.5,1.5,0.9,70.0,0.1\n1,2.0,1.2,0.7,80.0,0.05\n'


def test_columns_are_read_as_numbers(tmp_path):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    columns = read_summary(tmp_path / 'summary.csv')
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


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_matplotlib)
    with pytest.raises(ImportError, match=r'timm-coretune\[vis\]'):
        plot_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')
