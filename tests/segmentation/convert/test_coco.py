"""Masks from COCO's JSON, compared with what pycocotools decodes"""

import contextlib
import io
import json
import re
import sys

import numpy as np
import pytest
from annotations import coco_data, compress, runs_of, save_image, write_coco, write_json
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from timm_coretune.segmentation.convert.__main__ import main
from timm_coretune.segmentation.convert.coco import decode, open_coco, read_counts
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.segmentation import open_datasets

CLASSES = {3: 1, 18: 2, 90: 3}


def expected_masks(path, empty=0, crowd=255, first=1):
    """The masks by pycocotools and a sort: large instances first, then small ones, crowds where nothing else is."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    masks = {}
    for image in coco.loadImgs(coco.getImgIds()):
        mask = np.full((image['height'], image['width']), empty)
        drawn = []
        for number, record in enumerate(coco.loadAnns(coco.getAnnIds(image['id']))):
            if not record['segmentation'] or record['segmentation'] == [[1, 1, 4, 4]]:  # a box for pycocotools
                continue
            covered = coco.annToMask(record).astype(bool)
            is_crowd = record['iscrowd'] and crowd == 255
            label = crowd if is_crowd else CLASSES[record['category_id']] - 1 + first
            drawn.append((not is_crowd, -covered.sum(), number, covered, label))
        for *_, covered, label in sorted(drawn, key=lambda entry: entry[:3]):
            mask[covered] = label
        masks[image['file_name'].replace('/', '_')[:-4]] = mask
    return masks


def masks_in(folder):
    return {path.stem: np.array(Image.open(path)) for path in (folder / 'masks').iterdir()}


@pytest.mark.parametrize(
    'flags, reference',
    [([], {}), (['--crowd', 'class'], {'crowd': 0}), (['--no-background'], {'empty': 255, 'first': 0})],
    ids=['plain', 'crowd', 'no-background'],
)
def test_masks_are_those_of_pycocotools(tmp_path, capsys, flags, reference):
    path = write_coco(tmp_path)
    output = tmp_path / 'data'
    main(['convert', 'coco', str(path), '--images', str(tmp_path / 'val2017'), '--output', str(output), *flags])
    expected, found = expected_masks(path, **reference), masks_in(output)
    assert expected.keys() == found.keys() == {'a', 'b', 'city_c'}
    for name, mask in expected.items():
        assert np.array_equal(found[name], mask), name
    assert len(np.unique(found['a'])) == 5 - bool(flags)
    names = ['background', 'car', 'dog', 'tooth brush'][flags == ['--no-background'] :]
    assert (output / 'classes.txt').read_text().splitlines() == names
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [
        'all: 3 images and masks, 1 of them without an instance',
        'instances: 6 drawn',
        'left out: 1 instances that cover no pixel',
        'left out: 1 instances without a segmentation',
    ]
    assert printed[4].startswith(f'classes: {len(names)}, in classes.txt: ')
    for name in ('a.jpg', 'b.png', 'city/c.jpg'):
        copied = (output / 'images' / name.replace('/', '_')).read_bytes()
        assert copied == (tmp_path / 'val2017' / name).read_bytes()


def test_what_is_converted_is_what_training_reads(tmp_path):
    output = tmp_path / 'data'
    for split in ('train', 'val'):
        path = write_coco(tmp_path, split, (20, 14) if split == 'train' else (16, 15))
        main(
            ['convert', 'coco', str(path), '--images', str(tmp_path / f'{split}2017'), '--split', split]
            + ['--output', str(output), '--hard-link']
        )
    datasets = open_datasets(parse_args(['--segmentation', '--data-dir', str(output)]).settings)
    assert datasets.class_names == ['background', 'car', 'dog', 'tooth brush']
    for split, dataset in (('train', datasets.train), ('val', datasets.validation)):
        expected = expected_masks(tmp_path / f'instances_{split}2017.json')
        assert [np.array_equal(mask, expected[name]) for name, (_, mask) in zip('ab', dataset, strict=False)] == [1, 1]
        stored = np.array(Image.open(tmp_path / f'{split}2017' / 'b.png'))
        assert np.array_equal(dataset[1][0].permute(1, 2, 0), stored)
        assert (output / split / 'images' / 'b.png').stat().st_nlink == 2


def test_the_smaller_of_two_instances_covers_and_of_equal_ones_the_last(tmp_path):
    save_image(tmp_path / 'a.png', (8, 1))
    runs = {18: [0, 3, 5], 3: [2, 3, 3], 90: [4, 4]}  # columns 0 to 2, 2 to 4 and 4 to 7: the first two are equal
    for order, expected in (((18, 3, 90), [2, 2, 1, 1, 1, 3, 3, 3]), ((90, 3, 18), [2, 2, 2, 1, 1, 3, 3, 3])):
        annotations = [
            {'image_id': 1, 'category_id': key, 'segmentation': {'size': [1, 8], 'counts': runs[key]}} for key in order
        ]
        image = {'id': 1, 'file_name': 'a.png', 'width': 8, 'height': 1}
        path = write_json(tmp_path / 'a.json', {**coco_data(), 'images': [image], 'annotations': annotations})
        assert open_coco(str(path), str(tmp_path)).splits[''][0].draw().tolist() == [expected]


def test_a_category_called_background_is_class_0(tmp_path):
    data = coco_data()
    data['categories'][2]['name'] = 'Background'
    path = write_json(tmp_path / 'a.json', {**data, 'images': [], 'annotations': []})
    assert open_coco(str(path), '.').class_names == ['Background', 'car', 'tooth brush']
    assert open_coco(str(path), '.', background=False).class_names == ['car', 'Background', 'tooth brush']


@pytest.mark.parametrize('seed', range(20))
def test_rle_of_any_mask_is_decoded_as_pycocotools_does(seed):
    draws = np.random.default_rng(seed)
    mask = draws.random((draws.integers(1, 40), draws.integers(1, 90))) < draws.random()
    size = mask.shape[::-1]
    compressed = compress(mask)
    assert np.array_equal(decode(compressed, size, 'x'), coco_mask.decode(compressed))
    assert np.array_equal(decode(runs_of(mask), size, 'x'), mask)
    assert read_counts(compressed['counts'], 'x') == runs_of(mask)['counts']


def test_long_runs_have_counts_of_several_letters():
    mask = np.zeros((700, 900), bool)
    mask[:, 300:] = True
    mask[5, 7] = True
    assert np.array_equal(decode(compress(mask), (900, 700), 'x'), mask)


@pytest.mark.parametrize(
    'segmentation, problem',
    [
        ({'size': [3, 4], 'counts': [11]}, 'counts add up to 12'),
        ({'size': [3, 4], 'counts': [10, 10]}, 'counts add up to 12'),
        ({'size': [3, 4], 'counts': [-1, 13]}, 'counts add up to 12'),
        ({'size': [3, 4], 'counts': [2.0, 10]}, 'counts add up to 12'),
        ({'size': [3, 4], 'counts': None}, 'counts add up to 12'),
        ({'size': [3, 4], 'counts': 'o' * 30}, 'compressed RLE'),
        ({'size': [3, 4], 'counts': 'PPPPPPPPPPPPPPPPPPP0'}, 'compressed RLE'),
        ({'size': [3, 4], 'counts': '\u20ac'}, 'compressed RLE'),
        ({'size': [3, 4], 'counts': 'P'}, 'compressed RLE .*cut off'),
        ({'size': [4, 3], 'counts': [12]}, r'the size \[3, 4\]'),
        ({'counts': [12]}, r'the size \[3, 4\]'),
        ('x', 'polygons or RLE'),
        ([1, 2, 3, 4, 5, 6], 'list of coordinates'),
        ([[1, 2, 3, 4, 5]], 'list of coordinates'),
        ([[1, 2, 3, 4, 5, None]], 'coordinates within .* got None'),
        ([[1, 2, 3, 4, 5, float('nan')]], 'coordinates within .* got nan'),
        ([[1, 2, 3, 4, 5, 1e9]], r'coordinates within .* got 1000000000\.0'),
        ([[0, 0, 16, 16] * 70_000], 'outline of at most'),
    ],
    ids=range(18),
)
def test_a_segmentation_that_would_harm_is_refused(segmentation, problem):
    with pytest.raises(ValueError, match=f'{problem}.*'):
        decode(segmentation, (4, 3), 'annotation 5')


def change(data, path, value):
    *keys, last = path
    for key in keys:
        data = data[key]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    'path, value, problem',
    [
        (['images', 0, 'file_name'], '../secret.jpg', r"image 0 of .* path '\.\./secret\.jpg', which leads out"),
        (['images', 0, 'file_name'], '/etc/a.jpg', 'leads out of it'),
        (['images', 0, 'file_name'], '..\\a.jpg', 'leads out of it'),
        (['images', 0, 'file_name'], 'C:\\a.jpg', 'leads out of it'),
        (['images', 0, 'file_name'], 'a\0.jpg', 'leads out of it'),
        (['images', 0, 'file_name'], 'a.txt', 'Expected an image .* image 0'),
        (['images', 0, 'file_name'], 'none.jpg', "'none.jpg', which is no file"),
        (['images', 0, 'file_name'], 'x' * 300 + '.jpg', 'which is no file'),
        (['images', 0, 'file_name'], 5, "a text as 'file_name' in image 0"),
        (['images', 0, 'width'], 10**12, 'got 20 x 14'),
        (['images', 0, 'width'], True, "a whole number as 'width'"),
        (['images', 0, 'id'], KeyError, "Expected 'id' in image 0 of"),
        (['images', 0, 'id'], 9, 'image id once .* got 9 twice'),
        (['images', 0], 'a.jpg', "Expected 'id' in image 0"),
        (['annotations', 3, 'image_id'], KeyError, "Expected 'image_id' in annotation 3"),
        (['annotations', 3, 'image_id'], 77, 'known image in annotation 3 .* got 77'),
        (['annotations', 3, 'category_id'], 1, 'known category in annotation 3 .* got 1'),
        (['annotations', 3, 'segmentation'], {'size': [9, 9], 'counts': [81]}, r'RLE of the size \[14, 20\]'),
        (['annotations', 3, 'segments_info'], [], 'panoptic'),
        (['annotations'], KeyError, "Expected 'annotations' in .*no masks"),
        (['annotations'], {}, "a list as 'annotations'"),
        (['categories', 0, 'id'], 3, 'category id once .* got 3 twice'),
        (['categories', 0, 'name'], ' ', 'an empty one'),
        (['categories', 0, 'name'], '\ud800\x1b', 'an empty one'),
        (['categories'], [], 'Expected categories'),
        (['categories'], [{'id': n, 'name': f'{n}'} for n in range(255)], 'at most 255 classes'),
        (['images'], [], 'Expected images with annotations|known image'),
    ],
    ids=range(27),
)
def test_hostile_and_broken_json_is_refused_in_a_sentence(tmp_path, capsys, path, value, problem):
    file = write_coco(tmp_path)
    save_image(tmp_path / 'secret.jpg', (20, 14))
    data = json.loads(file.read_text())
    change(data, path, value)
    write_json(file, data)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as stopped:
        main(['convert', 'coco', str(file), '--images', str(tmp_path / 'val2017'), '--output', str(tmp_path / 'out')])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(problem, message), message
    assert len(message) < 700
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('text', ['', '{', '[' * 100_000, '[]', '1e999', '"\\ud800"', '9' * 5000], ids=range(7))
def test_what_is_no_coco_is_refused(tmp_path, text):
    path = tmp_path / 'a.json'
    path.write_text(text)
    with pytest.raises(ValueError, match=r'Expected .*a\.json'):
        open_coco(str(path), str(tmp_path))
    with pytest.raises(ValueError, match='which is missing'):
        open_coco(str(tmp_path / 'none.json'), str(tmp_path))


def test_missing_images_are_left_out_on_request_and_counted(tmp_path, capsys):
    path = write_coco(tmp_path)
    (tmp_path / 'val2017' / 'b.png').unlink()
    words = ['convert', 'coco', str(path), '--images', str(tmp_path / 'val2017'), '--output', str(tmp_path / 'out')]
    with pytest.raises(SystemExit):
        main(words)
    assert "'b.png', which is no file" in capsys.readouterr().err
    main([*words, '--skip-missing'])
    printed = capsys.readouterr().out
    assert 'left out: 1 images that are missing' in printed
    assert 'left out: 1 instances of missing images' in printed
    assert masks_in(tmp_path / 'out').keys() == {'a', 'city_c'}


def test_without_pycocotools_the_extra_is_named(tmp_path, monkeypatch, capsys):
    path = write_coco(tmp_path)
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    with pytest.raises(SystemExit):
        main(['convert', 'coco', str(path), '--images', str(tmp_path / 'val2017'), '--output', str(tmp_path / 'out')])
    assert "pip install 'timm-coretune[masks]'" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
