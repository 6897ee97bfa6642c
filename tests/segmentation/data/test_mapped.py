"""A value of a mask is the same class in all files: palettes that differ, classes by colour, and few values of many"""

import pickle

import numpy as np
import pytest
from PIL import Image

from timm_coretune.segmentation.data.dataset import create_dataset, open_dataset, open_source
from timm_coretune.segmentation.data.mapped import map_masks, read_colors
from timm_coretune.segmentation.data.masks import count_classes, write_ranges
from timm_coretune.segmentation.data.palette import voc_palette
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.segmentation import open_datasets

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def write_masks(root, masks, split='train', palettes=None, dtype=np.uint8):
    """A split of masks of one row each, with a palette each if there are any."""
    for kind in ('images', 'masks'):
        (root / split / kind).mkdir(parents=True)
    for number, values in enumerate(masks):
        values = np.array([values], dtype)
        Image.fromarray(np.zeros((*values.shape[:2], 3), np.uint8)).save(root / split / 'images' / f'{number}.png')
        mask = Image.fromarray(values)
        if palettes is not None and palettes[number] is not None:
            mask.putpalette([value for color in palettes[number] for value in color])
        mask.save(root / split / 'masks' / f'{number}.png')
    return root


def masks_of(dataset):
    return [dataset[index][1].flatten().tolist() for index in range(len(dataset))]


def open_both(root, *flags):
    words = ['--segmentation', '--data-dir', str(root), *map(str, flags)]
    return open_datasets(parse_args(words).settings)


@pytest.fixture
def three_colors(tmp_path):
    """Index 1 is red, green and blue in the three files."""
    palettes = [[BLACK, color] for color in (RED, GREEN, BLUE)]
    return write_masks(tmp_path / 'data', [[0, 1, 1], [1, 0, 0], [1, 1, 0]], palettes=palettes)


def test_a_used_index_of_two_colours_is_an_error_with_both_files(three_colors):
    message = r'index 1 is \(255, 0, 0\) in .*0\.png and \(0, 255, 0\) in .*1\.png.*--mask-colors FILE.*index'
    with pytest.raises(ValueError, match=message):
        open_dataset('', str(three_colors), 'train')
    with pytest.raises(ValueError, match=message):
        open_both(three_colors, '--val-split=')


def test_splits_are_compared_with_each_other(tmp_path):
    write_masks(tmp_path, [[0, 1]], 'train', [[BLACK, RED]])
    write_masks(tmp_path, [[0, 1]], 'val', [[BLACK, GREEN]])
    with pytest.raises(ValueError, match=r'index 1 .*train/masks/0\.png .*val/masks/0\.png'):
        open_both(tmp_path)
    assert len(open_both(tmp_path, '--val-split=').train) == 1
    assert open_both(tmp_path, '--mask-colors', 'index').num_classes == 2


@pytest.mark.parametrize(
    'palettes, values, flags',
    [
        ([[BLACK, RED], [BLACK, RED, GREEN]], [[0, 1], [0, 2]], ()),  # one has less entries
        ([[BLACK, RED, BLUE], [BLACK, RED, GREEN]], [[0, 1], [0, 2]], ()),  # blue is not used
        ([None, [BLACK, RED]], [[0, 1], [0, 1]], ()),  # a grey one beside
        ([[GREEN] * 255 + [RED], [GREEN] * 255 + [BLUE]], [[0, 255], [1, 255]], ()),  # the ignored index
        ([[RED, GREEN], [BLUE, GREEN]], [[0, 1], [0, 1]], ('--reduce-zero-label',)),
    ],
    ids=['shorter', 'unused', 'grey', 'ignored', 'reduced'],
)
def test_palettes_that_agree_where_they_are_used_are_no_error(tmp_path, palettes, values, flags):
    write_masks(tmp_path, values, palettes=palettes)
    assert len(open_both(tmp_path, '--val-split=', *flags).train) == 2


def test_colours_of_every_format_are_compared(tmp_path):
    for number, color in enumerate([RED, GREEN]):
        write_masks(tmp_path / f'{number}', [[0, 1]], palettes=[[BLACK, color]])
    for ending in ('bmp', 'gif', 'tif'):
        for kind in ('images', 'masks'):
            (tmp_path / ending / kind).mkdir(parents=True)
        for number in range(2):
            Image.new('RGB', (2, 1)).save(tmp_path / ending / 'images' / f'{number}.png')
            with Image.open(tmp_path / f'{number}' / 'train' / 'masks' / '0.png') as mask:
                mask.save(tmp_path / ending / 'masks' / f'{number}.{ending}')
        with pytest.raises(ValueError, match=r'\(255, 0, 0\) in .* and \(0, 255, 0\)'):
            open_dataset('', str(tmp_path / ending), 'train', hold_out=False)


def test_classes_are_read_by_their_colours(three_colors, tmp_path):
    file = tmp_path / 'colors.txt'
    file.write_text('0 255 0 leaf\n#000000 ignore\n\n255, 0, 0, petal of red\n#0000FF\n')
    datasets = open_both(three_colors, '--val-split=', '--mask-colors', file)
    assert datasets.class_names == ['leaf', 'petal of red', '2']
    assert datasets.num_classes == 3
    assert masks_of(datasets.train) == [[255, 1, 1], [0, 255, 255], [2, 2, 255]]
    assert masks_of(pickle.loads(pickle.dumps(datasets.train))) == masks_of(datasets.train)


def test_masks_in_colours_have_classes_too(tmp_path):
    colors = [tuple(voc_palette()[3 * index : 3 * index + 3]) for index in range(21)]
    (tmp_path / 'colors.txt').write_text('\n'.join(' '.join(map(str, color)) for color in colors))
    indices = np.random.default_rng(0).integers(0, 21, 50)
    write_masks(tmp_path / 'data', [np.array(colors)[indices]])
    dataset = open_both(tmp_path / 'data', '--val-split=', '--mask-colors', tmp_path / 'colors.txt').train
    assert masks_of(dataset) == [indices.tolist()]
    (tmp_path / 'colors.txt').write_text('0 0 0 ground\n128 0 0 plane')
    dataset = open_both(tmp_path / 'data', '--val-split=', '--mask-colors', tmp_path / 'colors.txt').train
    with pytest.raises(
        ValueError, match=r'only colours that --mask-colors .* lists, got \(.* of 50 pixels of .*0\.png'
    ):
        dataset[0]


@pytest.mark.parametrize(
    'text, problem',
    [
        ('1 2 name', "got '1 2 name'"),
        ('1 2 256 name', "got '1 2 256 name'"),
        ('#12345 name', "got '#12345 name'"),
        ('1 2 3 a\n#010203 b', r'\(1, 2, 3\) twice'),
        ('1 2 3 ignore', 'found none'),
        ('', 'found none'),
    ],
)
def test_a_file_of_colours_that_is_none_is_refused(tmp_path, text, problem):
    (tmp_path / 'colors.txt').write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_colors(str(tmp_path / 'colors.txt'))
    with pytest.raises(ValueError, match='No such file'):
        read_colors(str(tmp_path / 'nowhere.txt'))


def test_ranges_are_written_briefly():
    assert write_ranges([0, 1, 2, 3, 7, 9, 10]) == '0-3, 7, 9-10'
    assert write_ranges([5]) == '5'


def test_values_that_occur_are_said_and_gaps_are_a_warning(tmp_path, messages):
    write_masks(tmp_path, [[0, 127, 255], [0, 0, 127]])
    source = open_source('', str(tmp_path), 'train')
    assert count_classes(source) == 128
    assert messages() == ['Values in the masks: 0, 127']
    (warning,) = messages('WARNING')
    assert '2 different values, 0, 127, for which 128 classes are built' in warning
    assert '--remap-masks' in warning
    assert count_classes(source, reduce_zero_label=True) == 127


def test_values_without_gaps_are_no_warning(tmp_path, messages):
    write_masks(tmp_path, [[0, 1, 255], [2, 3, 4]])
    assert count_classes(open_source('', str(tmp_path), 'train')) == 5
    assert messages() == ['Values in the masks: 0-4']
    assert messages('WARNING') == []


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_few_values_become_classes_on_request_alike_in_both_splits(tmp_path, messages, dtype):
    high = 200 if dtype is np.uint8 else 40000
    write_masks(tmp_path, [[0, high, 255], [high, 0, 0]], dtype=dtype)
    write_masks(tmp_path, [[0, 10, high]], 'val', dtype=dtype)
    datasets = open_both(tmp_path, '--remap-masks')
    assert (datasets.num_classes, datasets.class_names) == (3, ['0', '10', str(high)])
    assert masks_of(datasets.train) == [[0, 2, 255], [2, 0, 0]]
    assert masks_of(datasets.validation) == [[0, 1, 2]]
    assert f'Values of the masks and their classes: 0 -> 0 (0), 10 -> 1 (10), {high} -> 2 ({high})' in messages()
    alone = open_both(tmp_path, '--remap-masks', '--eval-only')
    assert alone.train is None
    assert masks_of(alone.validation) == [[0, 1, 2]]
    assert alone.num_classes == 3
    reduced = open_both(tmp_path, '--remap-masks', '--reduce-zero-label')
    assert masks_of(reduced.train) == [[255, 1, 255], [1, 255, 255]]
    assert masks_of(reduced.validation) == [[255, 0, 1]]
    assert reduced.class_names == ['10', str(high)]


@pytest.mark.parametrize(
    'names, expected', [('sky sea sand', 'sky sea sand'), ('a b c d e f', 'a c f')], ids=['of-those', 'of-all']
)
def test_names_go_with_the_values(tmp_path, names, expected):
    write_masks(tmp_path, [[0, 2, 5]])
    (tmp_path / 'classes.txt').write_text('\n'.join(names.split()))
    assert open_both(tmp_path, '--val-split=', '--remap-masks').class_names == expected.split()


def test_without_the_request_nothing_is_mapped(tmp_path):
    source = open_source('', str(write_masks(tmp_path, [[0, 127]])), 'train')
    assert map_masks([source]) == [source]
    dataset = create_dataset(source)
    assert (dataset.num_classes, masks_of(dataset)) == (128, [[0, 127]])


def test_masks_of_hugging_face_are_compared(tmp_path):
    datasets = pytest.importorskip('datasets')
    masks = []
    for color in (RED, GREEN):
        mask = Image.fromarray(np.array([[0, 1]], np.uint8))
        mask.putpalette([*BLACK, *color])
        masks.append(mask)
    features = datasets.Features({'image': datasets.Image(), 'mask': datasets.Image()})
    table = {'image': [Image.new('RGB', (2, 1))] * 2, 'mask': masks}
    (tmp_path / 'data').mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / 'data' / 'train.parquet')
    with pytest.raises(ValueError, match=r'index 1 is \(255, 0, 0\) in hfds/.*train\[0\] and .*train\[1\]'):
        open_dataset(f'hfds/{tmp_path / "data"}', str(tmp_path / 'cache'), 'train')
