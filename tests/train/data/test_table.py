"""Tables of paths and labels give the data set that class folders of the same pictures give"""

import csv
import json
import os
import random
import re
import shlex
import sys

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from runs import outcome, train
from tiny_data import write_folders

from timm_coretune.__main__ import main
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.data.labelled import get_labels


def open_(path, *flags, **kwargs):
    return create_datasets(parse_args(['--data-dir', str(path), *map(str, flags)]).settings.data, **kwargs)


def write_table(path, rows, header=('image', 'label'), separator=','):
    if path.suffix == '.parquet':
        pyarrow, parquet = (pytest.importorskip(name) for name in ('pyarrow', 'pyarrow.parquet'))
        columns = {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        with open(path, 'w', newline='') as f:
            csv.writer(f, delimiter=separator).writerows([header, *rows] if header else rows)
    return path


def rows_of_folders(root, *splits):
    """Path, class and split of each image of class folders, in natural order."""
    paths = [path for split in splits for path in sorted((root / split).rglob('*.png'))]
    return [(os.path.relpath(path, root), path.parent.name, path.parent.parent.name) for path in paths]


@pytest.fixture
def folders(tmp_path):
    names = [f'{split}/{name}' for split in ('train', 'validation') for name in ('ant', 'bee', 'cat')]
    return write_folders(tmp_path / 'data', dict.fromkeys(names, 4))


@pytest.fixture
def pictures(tmp_path):
    """Three images of ants and three of bees."""
    return write_folders(tmp_path / 'data', {'ant': 3, 'bee': 3})


def pairs(root):
    return [(row[0], row[1]) for row in rows_of_folders(root, '.')]


HEADER = ('Path', 'class', 'split')


def test_a_table_trains_to_the_weights_that_folders_give_and_is_evaluated(folders, tmp_path, messages):
    table = write_table(folders / 'labels.csv', rows_of_folders(folders, 'train', 'validation'), HEADER)
    from_folders, from_table = (
        train(data, tmp_path / data.name, '--coretune', '--epochs', 1) for data in (folders, table)
    )
    assert outcome(from_table) == outcome(from_folders)
    assert json.loads((from_table / 'config.json').read_text())['label_names'] == ['ant', 'bee', 'cat']
    assert f"{table}: images from the column 'Path', labels from 'class', splits from 'split'." in messages()
    results = tmp_path / 'results'
    main([*map(str, ('evaluate', from_table, table, '--eval-output', results, '--workers', 0, '--device', 'cpu'))])
    (row,) = list(csv.DictReader((from_table / 'summary.csv').open()))
    assert json.loads((results / 'results.json').read_text())['top1'] == pytest.approx(float(row['eval_top1']))


def test_a_parquet_file_has_the_images_of_a_csv_file(folders):
    rows = rows_of_folders(folders, 'train', 'validation')
    found = [open_(write_table(folders / name, rows, HEADER)) for name in ('a.csv', 'a.parquet')]
    splits = [[(d.train.reader.samples, d.validation.reader.samples), get_labels(d.train)] for d in found]
    assert splits[0] == splits[1]
    assert get_labels(found[1].train) == [0] * 4 + [1] * 4 + [2] * 4


def test_string_labels_are_classes_in_natural_order_and_integers_are_indices(pictures):
    labels = ['c10', 'c9', 'b', 'b', 'c9', 'c10']
    table = write_table(pictures / 'a.csv', [(p, c) for (p, _), c in zip(pairs(pictures), labels, strict=True)])
    found = open_(table, '--val-split=')
    assert (found.num_classes, found.class_names) == (3, ['b', 'c9', 'c10'])
    assert get_labels(found.train) == [found.train[i][1] for i in range(6)] == [2, 1, 0, 0, 1, 2]
    numbers = write_table(pictures / 'b.csv', [(path, 2 * (c == 'bee')) for path, c in pairs(pictures)])
    found = open_(numbers, '--val-split=')
    assert (found.num_classes, found.class_names, get_labels(found.train)) == (3, None, [0, 0, 0, 2, 2, 2])
    leading = write_table(pictures / 'c.csv', [(path, f'0{c == "bee":d}') for path, c in pairs(pictures)])
    assert open_(leading, '--val-split=').class_names == ['00', '01']


def test_columns_separators_and_a_class_map_are_taken_as_asked(pictures, tmp_path):
    rows = [(7, f'./{path}', f'{name}, big', 'no') for path, name in pairs(pictures)]
    table = write_table(pictures / 'a.csv', rows, ('id', 'where', 'what', 'label'), ';')
    (tmp_path / 'map.txt').write_text('bee, big\nant, big\n')
    flags = ('--input-key', 'where', '--target-key', 'what', '--class-map', tmp_path / 'map.txt', '--val-split=')
    found = open_(table, *flags)
    assert (found.class_names, get_labels(found.train)) == (['bee, big', 'ant, big'], [1, 1, 1, 0, 0, 0])
    (tmp_path / 'map.txt').write_text('bee, big\n')
    with pytest.raises(ValueError, match="in --class-map, it has no 'ant, big'"):
        open_(table, *flags)


def test_without_splits_images_of_each_class_are_held_out_and_with_one_they_are_named(pictures, messages):
    rows = pairs(pictures)
    found = open_(write_table(pictures / 'a.csv', rows))
    assert (len(found.train), len(found.validation)) == (4, 2)
    assert sorted(get_labels(found.validation)) == [0, 1]
    splits = ['Train', 'Train', 'val', 'Train', 'test', '']
    table = write_table(
        pictures / 'b.csv', [(*row, s) for row, s in zip(rows, splits, strict=True)], ('file', 'target', 'Split')
    )
    found = open_(table)
    assert [len(found.train), len(found.validation), found.validated_on] == [3, 1, 'val']
    assert messages('WARNING') == [f'1 row(s) of {table} have no split, and are left out.']
    assert get_labels(open_(table, '--val-split', 'test').validation) == [1]
    with pytest.raises(ValueError, match="'dev' of --val-split in .* which has test, Train, val|has Train, test, val"):
        open_(table, '--val-split', 'dev')


def test_missing_and_broken_files_are_counted_and_named(pictures, messages):
    rows = [*pairs(pictures), ('gone/x.png', 'ant')]
    (pictures / 'bee' / '0.png').write_text('no image')
    found = open_(write_table(pictures / 'a.csv', rows), '--val-split=')
    assert len(found.train) == 5
    counted, *named = messages('WARNING')
    assert counted == '2 of 7 training images cannot be read and are left out of the training:'
    assert [os.path.join(pictures, path) in line for path, line in zip(('bee/0.png', 'gone/x.png'), named, strict=True)]
    assert 'No such file' in named[1]


def test_repeated_images_are_taken_once_and_conflicting_labels_are_an_error(pictures, messages):
    rows = pairs(pictures)
    found = open_(write_table(pictures / 'a.csv', [*rows, (f'./{rows[0][0]}', 'ant')]), '--val-split=')
    assert len(found.train) == 6
    assert any('1 row(s) of' in line and 'repeat an image' in line for line in messages('WARNING'))
    with pytest.raises(ValueError, match=r'one label for each image in .*, 1 have several: .*ant/0\.png'):
        open_(write_table(pictures / 'a.csv', [*rows, (f'./{rows[0][0]}', 'bee')]))


def broken_tables(pictures):
    rows = pairs(pictures)
    return {
        'no header': (rows, None, 'names of the columns in the first line'),
        'other names': (
            rows,
            ('img', 'label'),
            'a column called image, path.*; it has img, label. Name one by --input-key',
        ),
        'no label': (rows, ('image', 'kind'), 'a column called label.* Name one by --target-key'),
        'twice': (rows, ('image', 'image'), 'several are called image'),
        'empty label': (
            [*rows, (rows[0][0], '')],
            ('image', 'label'),
            r'a label in each row .*1 of 7 have none: ant/0',
        ),
        'empty path': ([*rows, ('', 'ant')], ('image', 'label'), '1 of 7 have none, such as row 7'),
        'short row': ([*rows, ('x.png',)], ('image', 'label'), '2 values in each row .* row 7 below it has 1'),
        'elsewhere': ([(f'x/{path}', name) for path, name in rows], ('image', 'label'), 'none of 6 is there'),
    }


@pytest.mark.parametrize('case', ['no header', 'other names', 'no label', 'twice', 'empty label', 'empty path']
    + ['short row', 'elsewhere'])  # fmt: skip
def test_a_table_that_cannot_be_meant_is_refused_with_the_fix(pictures, case):
    rows, header, message = broken_tables(pictures)[case]
    with pytest.raises(ValueError, match=message):
        open_(write_table(pictures / 'a.csv', rows, header))


@pytest.mark.parametrize(
    'content, ending, message',
    [
        (b'image,label\n\xff\xfe.png,a\n', 'csv', 'in UTF-8'),
        (b'image,label\na.png,a\n', 'parquet', 'Expected a Parquet file'),
        (b'', 'csv', 'a column called image'),
        (b'image,label\n', 'csv', 'none of 0 is there'),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, content, ending, message):
    path = tmp_path / f'a.{ending}'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / 'a.parquet').touch()
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match=r"pip install 'timm-coretune\[parquet\]'"):
        open_(tmp_path / 'a.parquet')


@pytest.mark.parametrize('form', ['columns', 'text', 'numbers', 'lists', 'rows'])
def test_several_labels_an_image(pictures, form):
    draws = random.Random(0)
    names = ['blue', 'green', 'red']
    sets = [[int(draws.random() < 0.5) for _ in names] for _ in range(6)]
    sets[0], sets[1] = [1, 1, 1], [0, 0, 0]
    chosen = [[name for name, on in zip(names, row, strict=True) if on] for row in sets]
    numbers = [[c for c in range(3) if row[c]] for row in sets]
    paths = [path for path, _ in pairs(pictures)]
    columns = {
        'columns': sets,
        'text': [['|'.join(row)] for row in chosen],
        'numbers': [['|'.join(map(str, row))] for row in numbers],
        'lists': [[row] for row in chosen],
        'rows': [[list(map(float, row))] for row in sets],
    }[form]
    table = pictures / ('a.parquet' if form in ('lists', 'rows') else 'a.csv')
    header = ('image', *names) if form == 'columns' else ('image', 'labels')
    write_table(table, [(path, *row) for path, row in zip(paths, columns, strict=True)], header)
    flags = ('--target-key', ','.join(names)) if form == 'columns' else ()
    flags = ('--target-format', 'multihot') if form == 'rows' else flags
    found = open_(table, '--task', 'multilabel', '--val-split=', *flags)
    assert found.class_names == (None if form in ('numbers', 'rows') else names)
    assert np.array_equal(np.stack([found.train[i][1] for i in range(6)]), np.array(sets, dtype=np.float32))


@pytest.mark.parametrize('ending', ['webp', 'bmp', 'gif', 'tiff', 'png'])
def test_images_of_other_kinds_in_folders_and_tables_have_the_pixels_that_were_saved(tmp_path, ending):
    values = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    wide = ending in ('tiff', 'png')  # of 16 bits
    for name, pixels in zip('ab', values, strict=True):
        (tmp_path / name).mkdir()
        picture = Image.fromarray(pixels.astype(np.uint16) * 257) if wide else Image.fromarray(pixels)
        picture.save(tmp_path / name / f'x.{ending}', **({'lossless': True} if ending == 'webp' else {}))
    table = write_table(tmp_path / 'labels.csv', [(f'{name}/x.{ending}', name) for name in 'ab'])
    for root in (tmp_path, table):
        found = open_(root, '--val-split=')
        assert [np.array_equal(np.array(found.train[i][0])[..., 0], values[i]) for i in range(2)] == [True, True]


def test_a_stream_and_a_table_of_hugging_face_name_the_columns_there_are(tmp_path):
    datasets = pytest.importorskip('datasets')
    (tmp_path / 'hub').mkdir()
    rows = {'img': [Image.new('RGB', (8, 8))] * 2, 'fine': [0, 1]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / 'hub' / 'train.parquet')
    cache = ('--val-split=', '--train-num-samples', 2)
    for kind in ('hfds', 'hfids'):
        words = (tmp_path / 'cache', *cache, '--dataset', f'{kind}/{tmp_path / "hub"}')
        with pytest.raises(ValueError, match="'image', the default of --input-key, .* which has fine, img"):
            open_(*words)
        with pytest.raises(ValueError, match="'label', the default of --target-key, .* which has fine, img"):
            open_(*words, '--input-key', 'img')
        with pytest.raises(ValueError, match='--target-key lable in .* which has fine, img'):
            open_(*words, '--input-key', 'img', '--target-key', 'lable')
        assert next(iter(open_(*words, '--input-key', 'img', '--target-key', 'fine').train))[1] in (0, 1)


@pytest.mark.slow
def test_the_commands_of_the_docs_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands, table = re.findall(r'```\n(.*?)```', (ROOT / 'docs' / 'data.md').read_text(), re.DOTALL)[:2]
    write_folders(tmp_path / 'PICTURES', {'ant': 10, 'bee': 10})
    (tmp_path / 'photos').mkdir()
    for row in csv.DictReader(table.splitlines()):
        Image.new('RGB', (16, 16)).save(tmp_path / row['image'])
    (tmp_path / 'labels.csv').write_text(table)
    of_training = ('--model', 'test_resnet', '--img-size', '32', '--epochs', '1', '--warmup-epochs', '0', '-b', '2')
    for command in commands.splitlines():
        words = shlex.split(command.removeprefix('python -m timm_coretune '))
        main([*words, '--device', 'cpu', '--workers', '0', *(of_training if words[0] == 'train' else ())])
    assert (tmp_path / 'output' / 'train' / 'tuned' / 'model_best.safetensors').is_file()
