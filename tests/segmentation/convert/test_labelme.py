"""Masks from labelme's JSON, compared with shapes that PIL draws one by one, and with some counted by hand"""

import base64
import io
import json
import re

import numpy as np
import pytest
from annotations import SHAPES, draw_by_pil, labelme_shape, save_image, write_json, write_labelme
from PIL import Image

from timm_coretune.segmentation.convert.__main__ import main
from timm_coretune.segmentation.convert.labelme import open_labelme
from timm_coretune.segmentation.data.dataset import open_dataset

LABELS = {'_background_': 0, 'cat': 1, 'dog': 2, '__ignore__': 255}


def convert(folder, *flags):
    output = folder.parent / 'out'
    main(['convert', 'labelme', str(folder), '--output', str(output), *map(str, flags)])
    return output


def mask_of(output, stem='a'):
    return np.array(Image.open(output / 'masks' / f'{stem}.png'))


def encode(image, kind='PNG'):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def refusal(capsys, folder, *flags):
    with pytest.raises(SystemExit) as stopped:
        convert(folder, *flags)
    assert stopped.value.code == 2
    assert not (folder.parent / 'out').exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_shapes_are_drawn_in_their_order_as_pil_draws_them(tmp_path, capsys):
    write_labelme(tmp_path / 'in')
    output = convert(tmp_path / 'in')
    assert np.array_equal(mask_of(output), draw_by_pil((18, 12), SHAPES, LABELS))
    assert np.unique(mask_of(output)).tolist() == [0, 1, 2, 255]
    assert (output / 'classes.txt').read_text().split() == ['_background_', 'cat', 'dog']
    printed = capsys.readouterr().out
    assert 'instances: 4 drawn' in printed
    assert 'left out: 2 shapes without an area (points and lines)' in printed
    dataset = open_dataset('', str(output), 'train', hold_out=False)
    assert (dataset.num_classes, len(dataset)) == (3, 1)
    assert np.array_equal(dataset[0][1], mask_of(output))


def test_a_rectangle_covers_its_corners_and_a_circle_what_is_near(tmp_path):
    shapes = [labelme_shape('a', [[2, 3], [6, 8]], 'rectangle'), labelme_shape('b', [[12, 6], [15, 6]], 'circle')]
    write_labelme(tmp_path / 'in', shapes=shapes)
    mask = mask_of(convert(tmp_path / 'in'))
    rows, columns = np.indices(mask.shape)
    assert np.array_equal(mask == 1, (rows >= 3) & (rows <= 8) & (columns >= 2) & (columns <= 6))
    distance = np.hypot(rows - 6, columns - 12)
    assert (mask[distance <= 2.5] == 2).all()
    assert (mask[distance > 3.5] != 2).all()


def test_a_mask_shape_lies_at_its_corner(tmp_path):
    stencil = np.array([[0, 1, 1], [1, 0, 1]], bool)
    shape = labelme_shape('x', [[4, 5], [6, 6]], 'mask', mask=encode(Image.fromarray(stencil)))
    write_labelme(tmp_path / 'in', shapes=[shape])
    expected = np.zeros((12, 18), int)
    expected[5:7, 4:7] = stencil
    assert np.array_equal(mask_of(convert(tmp_path / 'in')), expected)


def test_a_missing_image_is_taken_from_the_json(tmp_path):
    path = write_labelme(tmp_path / 'in', imageData=encode(Image.new('RGB', (18, 12), (9, 8, 7)), 'PNG'))
    (tmp_path / 'in' / 'a.jpg').unlink()
    output = convert(tmp_path / 'in')
    assert Image.open(output / 'images' / 'a.png').getpixel((3, 3)) == (9, 8, 7)
    assert [file.name for file in (output / 'images').iterdir()] == ['a.png']
    write_json(path, {**json.loads(path.read_text()), 'imagePath': '..\\elsewhere\\a.jpg'})
    assert np.array_equal(mask_of(convert(tmp_path / 'in', '--overwrite')), mask_of(output))


def test_images_of_another_folder_are_found_by_their_own_names(tmp_path, capsys):
    write_labelme(tmp_path / 'in', imagePath='..\\photos\\a.jpg')
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'in' / 'a.jpg').rename(tmp_path / 'photos' / 'a.jpg')
    message = refusal(capsys, tmp_path / 'in')
    assert 'leads out of it' in message
    assert '--images FOLDER' in message
    assert mask_of(convert(tmp_path / 'in', '--images', tmp_path / 'photos')).any()


def test_splits_have_the_classes_of_the_first(tmp_path, capsys):
    write_labelme(tmp_path / 'in')
    write_labelme(tmp_path / 'val', shapes=SHAPES[2:3])
    convert(tmp_path / 'in', '--split', 'train')
    output = convert(tmp_path / 'val', '--split', 'val')
    assert np.unique(Image.open(output / 'val' / 'masks' / 'a.png')).tolist() == [0, 2]
    write_labelme(tmp_path / 'val', shapes=[labelme_shape('cow', [[1, 1], [5, 1], [5, 5]])])
    with pytest.raises(SystemExit):
        convert(tmp_path / 'val', '--split', 'test')
    assert re.search(r"got 'cow' in .*a\.json.* the folder that is written to", capsys.readouterr().err)
    (tmp_path / 'names.txt').write_text('_background_\ncow\n')
    plan = open_labelme(str(tmp_path / 'val'), classes=str(tmp_path / 'names.txt'))
    assert plan.class_names == ['_background_', 'cow']
    assert np.unique(plan.splits[''][0].draw()).tolist() == [0, 1]


def test_a_turned_photo_has_the_size_that_a_viewer_shows(tmp_path):
    write_labelme(tmp_path / 'in')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (12, 18)).save(tmp_path / 'in' / 'a.jpg', exif=exif)
    image, mask = open_dataset('', str(convert(tmp_path / 'in')), 'train', hold_out=False)[0]
    assert image.shape == (3, 12, 18)
    assert np.array_equal(mask, draw_by_pil((18, 12), SHAPES, LABELS))


@pytest.mark.parametrize(
    'more, problem',
    [
        ({'imagePath': '../../a.jpg'}, 'leads out of it'),
        ({'imagePath': 'gone.jpg'}, "Expected the image 'gone.jpg' of .*--images, or leave it out with --skip-missing"),
        ({'imagePath': 'gone.jpg', 'imageData': '%%%'}, 'an image in base64'),
        ({'imagePath': 'gone.jpg', 'imageData': 'aGVsbG8='}, 'Expected an image in .* no kind of image'),
        ({'imageWidth': 10**10}, 'an image of 10000000000 x 12 pixels.* got 18 x 12'),
        ({'imageWidth': 12, 'imageHeight': 18}, 'an image of 12 x 18 pixels'),
        ({'shapes': None}, "a list as 'shapes'"),
        ({'shapes': ['x']}, "Expected 'label' in shape 0"),
        ({'shapes': [labelme_shape(5, [])]}, "a text as 'label' in shape 0"),
        ({'shapes': [labelme_shape('x', [[1, 1], [1e12, 1], [3, 3]])]}, 'coordinates within .* shape 0'),
        ({'shapes': [labelme_shape('x', [[1, 1], [float('inf'), 1], [3, 3]])]}, 'coordinates within .* got inf'),
        ({'shapes': [labelme_shape('x', [[1, 1, 1]])]}, 'list of coordinates'),
        ({'shapes': [labelme_shape('x', [[1, 1], [2, 2]], 'star')]}, "got 'star' of 2 points"),
        ({'shapes': [labelme_shape('x', [[1, 1]], 'circle')]}, "got 'circle' of 1 points"),
        ({'shapes': [labelme_shape('x', [[1, 1], [2, 2]], 'mask')]}, "Expected 'mask' in shape 0"),
        (
            {'shapes': [labelme_shape('x', [[1, 1], [2, 2]], 'mask', mask=encode(Image.new('1', (9, 9))))]},
            'a mask that fits its corners',
        ),
    ],
    ids=range(16),
)
def test_hostile_and_broken_json_is_refused_in_a_sentence(tmp_path, capsys, more, problem):
    save_image(tmp_path / 'a.jpg', (18, 12))
    write_labelme(tmp_path / 'in', **more)
    assert re.search(problem, refusal(capsys, tmp_path / 'in'))


def test_a_folder_without_annotations_is_refused(tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    assert 'Expected JSON files of labelme' in refusal(capsys, tmp_path / 'in')
    assert 'which is none' in refusal(capsys, tmp_path / 'nowhere')
    write_labelme(tmp_path / 'in', 'b')
    write_labelme(tmp_path / 'in', 'a', imagePath='gone.jpg')
    plan = open_labelme(str(tmp_path / 'in'), skip_missing=True)
    assert [sample.stem for sample in plan.splits['']] == ['b']
    assert dict(plan.left_out) == {'images that are missing': 1, 'shapes of missing images': 6}
