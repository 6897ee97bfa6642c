"""Masks that are called or stored otherwise: read where it is certain, else what was found is named"""

import numpy as np
import pytest
from PIL import Image

from timm_coretune.segmentation.data.dataset import open_dataset
from timm_coretune.segmentation.data.folders import open_folders
from timm_coretune.segmentation.data.masks import read_mask

VALUES = np.array([[0, 1, 2], [3, 20, 254]], np.uint8)


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path, **options)


def write_names(root, images, masks):
    for number, name in enumerate(images):
        save(root / 'images' / name, np.full((2, 2, 3), 10 * number))
    for number, name in enumerate(masks):
        save(root / 'masks' / name, np.full((2, 2), number))


def names_of(root):
    source = open_folders(str(root), 'train', hold_out=False)
    return [path.rpartition('/')[2] for path in source.masks]


@pytest.mark.parametrize('channels', [[0, 255], [0, 0, 0], [0, 0, 0, 255]], ids=['LA', 'RGB', 'RGBA'])
def test_grey_in_colours_is_read_as_grey(tmp_path, channels):
    stacked = np.stack([VALUES if value == 0 else np.full_like(VALUES, value) for value in channels], axis=-1)
    save(tmp_path / 'images' / 'a.png', np.zeros((2, 3, 3)))
    save(tmp_path / 'masks' / 'a.png', stacked)
    dataset = open_dataset('', str(tmp_path), 'train', hold_out=False)
    assert dataset.num_classes == 255
    assert dataset[0][1].tolist() == VALUES.tolist()


@pytest.mark.parametrize(
    'pixel, problem',
    [
        ([5, 254], 'mode LA.* transparent in some pixels'),
        ([5, 5, 5, 0], 'mode RGBA.* transparent in some pixels'),
        ([5, 5, 6], 'mode RGB.* red, green and blue differ'),
        ([5, 6, 5, 255], 'mode RGBA.* red, green and blue differ'),
    ],
    ids=str,
)
def test_one_pixel_that_is_not_grey_or_not_opaque_is_refused(pixel, problem):
    pixels = np.full((2, 2, len(pixel)), [5] * len(pixel))
    if len(pixel) in (2, 4):
        pixels[..., -1] = 255
    pixels[1, 1] = pixel
    with pytest.raises(ValueError, match=f'in m, got an image of {problem}'):
        read_mask(Image.fromarray(pixels.astype(np.uint8)), 'm')


def test_16_bits_a_channel_are_not_cut_to_8(tmp_path):
    """PIL has no such images, so the PNG is made by hand."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    (tmp_path / 'masks').mkdir()
    rows = b'\0' + struct.pack('>6H', 1, 1, 1, 2, 2, 2)
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 1, 16, 2, 0, 0, 0))
    png = b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    (tmp_path / 'masks' / 'a.png').write_bytes(png)
    save(tmp_path / 'images' / 'a.png', np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match=r'a\.png.*16 bits a channel'):
        open_dataset('', str(tmp_path), 'train', 3, hold_out=False)[0]


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_a_lossy_mask_is_refused_whatever_it_is_called(tmp_path, name):
    save(tmp_path / 'images' / 'a.png', np.zeros((2, 3, 3)))
    options = {'compression': 'jpeg'} if name == 'a.tif' else {'format': 'JPEG'}
    save(tmp_path / 'masks' / name, VALUES, **options)
    for num_classes in (None, 255):
        with pytest.raises(ValueError, match=rf'lossless file for .*{name}.*Save the mask as PNG'):
            open_dataset('', str(tmp_path), 'train', num_classes, hold_out=False)[0]


def test_jpeg_masks_are_named_with_the_repair_which_works(tmp_path):
    for stem in 'ab':
        save(tmp_path / 'images' / f'{stem}.jpg', np.zeros((32, 32, 3)))
        save(tmp_path / 'masks' / f'{stem}.jpg', 255 * (np.indices((32, 32)).sum(0) > 30), quality=75)
    with pytest.raises(ValueError, match=r"a mask a in .*2 JPEG files like 'a\.jpg'\. JPEG changes class indices"):
        open_dataset('', str(tmp_path), 'train', hold_out=False)
    file = tmp_path / 'masks' / 'a.jpg'
    repaired = Image.open(file).convert('L').point(lambda value: value > 127)
    assert np.array_equal(np.array(repaired), np.indices((32, 32)).sum(0) > 30)


@pytest.mark.parametrize(
    'images, masks',
    [
        (['cat_1.jpg', 'cat_10.jpg'], ['cat_1_mask.png', 'cat_10_mask.png']),
        (['cat.jpg', 'cat_1.jpg'], ['cat_seg.png', 'cat_1_seg.png']),
        (['a.jpg', 'b.jpg'], ['a_gt.png', 'b_gt.tif']),
        (['a.jpg', 'b.jpg'], ['a-labelIds.png', 'b-labelIds.png', 'readme_labelIds.png']),
        (['1_sat.jpg', '2_sat.jpg'], ['1_mask.png', '2_mask.png']),
        (['x_1_leftImg8bit.png', 'y_2_leftImg8bit.png'], ['x_1_gtFine_labelIds.png', 'y_2_gtFine_labelIds.png']),
        (['1_image.jpg', '2_image.jpg'], ['1.png', '2.png']),
    ],
    ids=lambda names: names[0],
)
def test_one_suffix_of_all_masks_is_found_and_said(tmp_path, messages, images, masks):
    write_names(tmp_path, images, masks)
    expected = {image: mask for image, mask in zip(images, masks, strict=False)}
    assert names_of(tmp_path) == [expected[image] for image in sorted(images)]
    assert any('Masks in' in message for message in messages())


@pytest.mark.parametrize(
    'images, masks, problem',
    [
        (
            ['cat_01.jpg', 'cat_02.jpg'],
            ['cat_01_mask_0.png', 'cat_01_mask_1.png', 'cat_02_mask_0.png'],
            r"3 masks like 'cat_01_mask_0\.png', expected 'cat_01\.png'\. This image has 2",
        ),
        (['a.jpg', 'b.jpg'], ['a_mask.png', 'b_seg.png'], r"2 masks like 'a_mask\.png', expected 'a\.png'"),
        (['a.jpg', 'b.jpg'], ['a_1.png', 'b_1.png'], r"2 masks like 'a_1\.png'"),  # a number may count instances
        (['a.jpg', 'b.jpg'], ['a.png', 'b_mask.png'], r"1 masks like 'b_mask\.png', expected 'b\.png'"),
        (['a.jpg', 'b.jpg'], ['amask.png', 'bmask.png'], r"2 masks like 'amask\.png'"),
        (['a.jpg'], ['b.png'], r"none with .* and this name, but 1 masks like 'b\.png'"),
    ],
    ids=['instances', 'two-suffixes', 'numbers', 'some', 'no-separator', 'others'],
)
def test_what_is_not_certain_is_named_and_not_read(tmp_path, images, masks, problem):
    write_names(tmp_path, images, masks)
    with pytest.raises(ValueError, match=problem):
        names_of(tmp_path)


def test_lists_of_splits_pair_masks_with_a_suffix(tmp_path):
    write_names(tmp_path, ['a.jpg', 'b.jpg', 'c.jpg'], ['a_mask.png', 'b_mask.png'])  # c is in no list
    (tmp_path / 'train.txt').write_text('b\na\n')
    assert names_of(tmp_path) == ['b_mask.png', 'a_mask.png']


def test_what_a_folder_has_in_place_of_masks_is_said(tmp_path):
    write_names(tmp_path, ['a.jpg'], [])
    (tmp_path / 'masks').mkdir()
    with pytest.raises(ValueError, match='found none with .*; it is empty'):
        names_of(tmp_path)
    for name in ('a.npy', 'b.npy', 'c.json'):
        (tmp_path / 'masks' / name).write_text('')
    with pytest.raises(ValueError, match=r'but 2 files with the ending \.npy, 1 file with the ending \.json'):
        names_of(tmp_path)
    (tmp_path / 'masks').rename(tmp_path / 'labels')
    with pytest.raises(ValueError, match=r'found neither, but images/, labels/\. .* timm-coretune masks convert'):
        names_of(tmp_path)
    (tmp_path / 'images' / 'a.jpg').rename(tmp_path / 'images' / 'a.heic')
    (tmp_path / 'labels').rename(tmp_path / 'masks')
    with pytest.raises(ValueError, match=r'Expected images in .*found none, but 1 file with the ending \.heic'):
        names_of(tmp_path)
