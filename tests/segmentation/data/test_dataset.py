"""Images and masks of segmentation: palettes, masks, folders, libraries, and the data set over them."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes

from timm_coretune.segmentation.data.dataset import open_dataset
from timm_coretune.segmentation.data.folders import open_folders, resolve_split
from timm_coretune.segmentation.data.masks import check_mask, count_classes, read_mask
from timm_coretune.segmentation.data.palette import VOC_CLASSES, voc_palette, write_mask


def save(path, values, mode=None):
    """An image of these values, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values), mode).save(path)
    return path


def save_pair(images, masks, stem, value, size=(6, 4)):
    """A JPEG of one brightness and a mask of one class, so that a mixed-up pair would be seen."""
    width, height = size
    save(images / f'{stem}.jpg', np.full((height, width, 3), value * 10, np.uint8))
    masks.mkdir(parents=True, exist_ok=True)
    write_mask(np.full((height, width), value), str(masks / f'{stem}.png'))


def save_voc(folder, splits):
    for split, values in splits.items():
        for value in values:
            save_pair(folder / 'JPEGImages', folder / 'SegmentationClass', f'2007_{value:06d}', value)
        lists = folder / 'ImageSets' / 'Segmentation'
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f'{split}.txt').write_text(''.join(f'2007_{value:06d}\n' for value in values))


def classes_of(dataset):
    """Class of every image, after a check that image and mask belong together."""
    found = []
    for image, mask in dataset:
        assert abs(float(image.float().mean()) - 10 * int(mask[0, 0])) < 2
        found.append(int(mask[0, 0]))
    return found


@pytest.mark.parametrize('place', ['images/0.jpg', 'masks/0.png'])
def test_a_pipe_and_an_image_of_too_many_pixels_are_errors_with_their_names(tmp_path, monkeypatch, place):
    save_pair(tmp_path / 'images', tmp_path / 'masks', '0', 1, size=(60, 40))
    data = open_dataset('', str(tmp_path), 'train', num_classes=2, hold_out=False)
    named = r"masks/0\.png: the image '.*images/0\.jpg': it" if place == 'images/0.jpg' else r'masks/0\.png: it'
    with monkeypatch.context() as patch:
        patch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
        save(tmp_path / ('masks/0.png' if place == 'images/0.jpg' else 'images/0.jpg'), np.zeros((9, 9), np.uint8))
        with pytest.raises(ValueError, match=named + r' has 2400 pixels.*CORETUNE_MAX_PIXELS=2400'):
            data[0]
    (tmp_path / place).unlink()
    os.mkfifo(tmp_path / place)
    with pytest.raises(ValueError, match=named + ' is a named pipe'):
        data[0]
    if place.startswith('masks'):
        with pytest.raises(ValueError, match=r'masks/0\.png: it is a named pipe'):
            open_dataset('', str(tmp_path), 'train', hold_out=False)


def test_the_palette_is_that_of_voc():
    palette = np.array(voc_palette()).reshape(256, 3)
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[[15, 20, 255]].tolist() == [[192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert len({tuple(colour) for colour in palette.tolist()}) == 256
    assert len(VOC_CLASSES) == 21


def test_a_written_mask_is_read_back_whatever_its_values(tmp_path):
    path = tmp_path / 'mask.png'
    mask = torch.arange(256, dtype=torch.int64).reshape(8, 32)
    write_mask(mask, str(path))
    with Image.open(path) as image:
        assert image.mode == 'P'
        assert image.getpalette() == voc_palette()
    assert torch.equal(read_mask(path, 'm').long(), mask)
    assert [entry.name for entry in tmp_path.iterdir()] == ['mask.png']


@pytest.mark.parametrize(
    'mask', [np.full((2, 2), 256), np.full((2, 2), -1), np.zeros((1, 2, 2), int), np.zeros((2, 2))]
)
def test_what_is_no_mask_is_not_written(tmp_path, mask):
    with pytest.raises(ValueError, match='Expected'):
        write_mask(mask, str(tmp_path / 'mask.png'))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('ending', ['.png', '.tif', '.bmp', '.gif'])
def test_indices_of_a_palette_count_in_every_format(tmp_path, ending):
    image = Image.fromarray(np.array([[0, 1, 7], [20, 3, 255]], np.uint8))
    image.putpalette(voc_palette())
    image.save(tmp_path / f'mask{ending}', optimize=False)  # the optimisation of GIF renumbers the palette
    assert read_mask(tmp_path / f'mask{ending}', 'm').tolist() == [[0, 1, 7], [20, 3, 255]]


@pytest.mark.parametrize(
    'dtype, values',
    [(np.uint8, [0, 5, 255]), (np.uint16, [0, 300, 65535]), (np.int32, [0, 300, 70000]), (bool, [0, 1])],
)
def test_grey_masks_keep_their_values_up_to_32_bits(tmp_path, dtype, values):
    path = save(tmp_path / 'mask.png', np.array([values], dtype)) if dtype is not np.int32 else None
    mask = read_mask(path or save(tmp_path / 'mask.tif', np.array([values], dtype)), 'm')
    assert mask.tolist() == [values]
    assert mask.dtype == (torch.uint8 if dtype in (np.uint8, bool) else torch.int64)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_a_mask_of_colours_is_refused_by_name(mode):
    with pytest.raises(ValueError, match=rf'masks/a\.png, got an image of mode {mode}\. Convert'):
        read_mask(Image.new(mode, (3, 2), {'LA': (1, 0)}.get(mode, (1, 2, 3))), 'masks/a.png')


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r'of 5 x 2 pixels.* got 3 x 2 in masks/a\.png'):
        read_mask(Image.new('L', (3, 2)), 'masks/a.png', size=(5, 2))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_zero_is_ignored_and_other_classes_move_down(dtype):
    image = Image.fromarray(np.array([[0, 1, 2], [150, 254, 255]], dtype))
    assert read_mask(image, 'm', reduce_zero_label=True).tolist() == [[255, 0, 1], [149, 253, 255]]


def test_a_value_out_of_range_is_named():
    check_mask(torch.tensor([[0, 20, 255]], dtype=torch.uint8), 21, 'm')
    check_mask(torch.full((2, 2), 255, dtype=torch.uint8), 21, 'm')
    with pytest.raises(ValueError, match=r'0 to 20, or 255 .*the value 21 in masks/a\.png'):
        check_mask(torch.tensor([[0, 255, 21]], dtype=torch.uint8), 21, 'masks/a.png')
    with pytest.raises(ValueError, match='the value 256 in'):
        check_mask(torch.tensor([[256, 0]]), 21, 'm')
    with pytest.raises(ValueError, match='the value -3 in'):
        check_mask(torch.tensor([[-3, 0]]), 21, 'm')


@pytest.mark.parametrize('reduce_zero_label, expected', [(False, 8), (True, 7)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_classes_are_counted_without_the_ignored_value(tmp_path, dtype, reduce_zero_label, expected):
    for index, values in enumerate([[0, 7, 255], [0, 3, 3], [0, 0, 255]]):
        save(tmp_path / 'images' / f'{index}.png', np.zeros((1, 3, 3), np.uint8))
        save(tmp_path / 'masks' / f'{index}.png', np.array([values], dtype))
    assert count_classes(open_folders(str(tmp_path), 'train', hold_out=False), reduce_zero_label) == expected


def test_masks_without_any_class_cannot_be_counted(tmp_path):
    save_pair(tmp_path / 'images', tmp_path / 'masks', 'a', 0)
    write_mask(np.full((4, 6), 255), str(tmp_path / 'masks' / 'a.png'))
    with pytest.raises(ValueError, match='all pixels are 255'):
        open_dataset('', str(tmp_path), 'train', hold_out=False)
    image, mask = open_dataset('', str(tmp_path), 'train', num_classes=3, hold_out=False)[0]
    assert mask.unique().tolist() == [255]


def test_splits_find_their_synonyms_in_order():
    assert resolve_split('validation', ['train', 'val', 'test'], 'x') == 'val'
    assert resolve_split('val', ['test', 'validation'], 'x') == 'validation'
    assert resolve_split('test', ['val', 'test'], 'x') == 'test'
    assert resolve_split('train', ['test', 'training'], 'x') == 'training'
    with pytest.raises(ValueError, match=re.escape("a split 'train' in x, which has ['test']")):
        resolve_split('train', ['test'], 'x')


@pytest.mark.parametrize('place', ['.', 'VOCdevkit/VOC2012', 'VOC2007'])
def test_voc_is_found_in_all_its_places(tmp_path, place):
    save_voc(tmp_path / place, {'train': [3, 1], 'val': [20]})
    dataset = open_dataset('', str(tmp_path), 'train')
    assert classes_of(dataset) == [3, 1]  # as listed
    assert dataset.num_classes == 21
    assert dataset.class_names == list(VOC_CLASSES)
    assert classes_of(open_dataset('', str(tmp_path), 'validation')) == [20]


@pytest.mark.parametrize('layout', ['{split}/{kind}', '{kind}/{split}'])
def test_pairs_of_folders_have_their_splits_inside_or_outside(tmp_path, layout):
    for split, values in {'train': [1, 2, 3], 'val': [4]}.items():
        for value in values:
            images, masks = (tmp_path / layout.format(split=split, kind=kind) for kind in ('images', 'masks'))
            save_pair(images, masks, f'{value}', value)
    dataset = open_dataset('', str(tmp_path), 'train')
    assert classes_of(dataset) == [1, 2, 3]
    assert dataset.num_classes == 4
    assert dataset.class_names is None
    assert classes_of(open_dataset('', str(tmp_path), 'validation', num_classes=5)) == [4]
    with pytest.raises(ValueError, match="a split 'extra'"):
        open_dataset('', str(tmp_path), 'extra')


def test_lists_split_a_pair_of_folders(tmp_path):
    for value in range(4):
        save_pair(tmp_path / 'images', tmp_path / 'masks', f'{value}', value)
    (tmp_path / 'train.txt').write_text('2\n0.jpg\n\n')
    (tmp_path / 'README.txt').write_text('no list')
    assert classes_of(open_dataset('', str(tmp_path), 'train')) == [2, 0]
    with pytest.raises(ValueError, match=re.escape("'val'") + '.*' + re.escape("['train']")):
        open_dataset('', str(tmp_path), 'val')  # holding images out could take some of those listed
    (tmp_path / 'val.txt').write_text('3\n')
    assert classes_of(open_dataset('', str(tmp_path), 'validation')) == [3]


def test_every_tenth_image_is_held_out_without_splits(tmp_path, caplog):
    for value in range(12):
        save_pair(tmp_path / 'images', tmp_path / 'masks', f'{value:02d}', value)
    with caplog.at_level('INFO'):
        held_out = classes_of(open_dataset('', str(tmp_path), 'val', num_classes=12))
    assert held_out == [0, 10]
    assert '2 of 12 images for val' in caplog.text
    rest = classes_of(open_dataset('', str(tmp_path), 'train', num_classes=12))
    assert sorted(held_out + rest) == list(range(12))
    assert classes_of(open_dataset('', str(tmp_path), 'train', hold_out=False)) == list(range(12))


def test_one_image_is_too_few_to_hold_one_out(tmp_path):
    save_pair(tmp_path / 'images', tmp_path / 'masks', 'a', 1)
    with pytest.raises(ValueError, match='at least two images'):
        open_dataset('', str(tmp_path), 'train')


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r'does not exist.*JPEGImages/.*images/ and masks/'):
        open_dataset('', str(tmp_path / 'nowhere'), 'train')
    with pytest.raises(ValueError, match=r'found neither.*JPEGImages/.*images/ and masks/'):
        open_dataset('', str(tmp_path), 'train')
    save_voc(tmp_path / 'voc', {'train': [1, 2]})
    (tmp_path / 'voc' / 'SegmentationClass' / '2007_000002.png').unlink()
    with pytest.raises(ValueError, match=r'a mask 2007_000002 in .*for the image .*2007_000002\.jpg'):
        open_dataset('', str(tmp_path / 'voc'), 'train')
    (tmp_path / 'voc' / 'JPEGImages' / '2007_000001.jpg').unlink()
    with pytest.raises(ValueError, match=r"an image '2007_000001'.*train\.txt.* lists it"):
        open_dataset('', str(tmp_path / 'voc'), 'train')


def test_items_that_do_not_fit_name_their_file(tmp_path):
    for stem in 'abcd':
        save_pair(tmp_path / 'images', tmp_path / 'masks', stem, 1)
    save(tmp_path / 'masks' / 'a.png', np.full((4, 6), 9, np.uint8))
    save(tmp_path / 'masks' / 'b.png', np.full((4, 5), 1, np.uint8))
    save(tmp_path / 'masks' / 'c.png', np.full((4, 6, 3), (1, 0, 0), np.uint8))
    (tmp_path / 'masks' / 'd.png').write_bytes((tmp_path / 'masks' / 'd.png').read_bytes()[:40])
    dataset = open_dataset('', str(tmp_path), 'train', num_classes=2, hold_out=False)
    for index, problem in enumerate(['the value 9 in', '6 x 4 pixels', 'mode RGB', 'can be read']):
        with pytest.raises(ValueError, match=problem) as caught:
            dataset[index]
        assert str(tmp_path / 'masks' / f'{"abcd"[index]}.png') in str(caught.value)


def save_turned(folder, orientation, masks_as_shown, size=(6, 4)):
    """A photo whose brightness is 60 times the class in its mask, drawn on it as it is shown or as it is stored."""
    values = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0]) % 4
    (folder / 'images').mkdir()
    (folder / 'masks').mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(values * 60).convert('RGB')
    stored.save(folder / 'images' / 'a.png', exif=exif)
    shown = ImageOps.exif_transpose(Image.open(folder / 'images' / 'a.png'))
    Image.fromarray(np.array(shown if masks_as_shown else stored)[..., 0] // 60).save(folder / 'masks' / 'a.png')
    return shown if masks_as_shown else stored


@pytest.mark.parametrize('size', [(6, 4), (5, 5)], ids=['oblong', 'square'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_turned_photo_and_its_mask_agree_in_every_pixel(tmp_path, orientation, size):
    shown = save_turned(tmp_path, orientation, True, size)
    image, mask = open_dataset('', str(tmp_path), 'train', hold_out=False)[0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(shown))
    assert torch.equal(image[0], mask * 60)


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_a_mask_that_fits_a_photo_only_as_it_is_stored_is_followed_and_said_once(tmp_path, orientation, messages):
    stored = save_turned(tmp_path, orientation, False)
    dataset = open_dataset('', str(tmp_path), 'train', hold_out=False)
    for _ in range(2):
        image, mask = dataset[0]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(stored))
        assert torch.equal(image[0], mask * 60)
    assert [str(tmp_path / 'masks' / 'a.png') in m and 'EXIF' in m for m in messages('WARNING')] == [True]


def test_a_mask_is_turned_by_its_own_exif(tmp_path):
    save_turned(tmp_path, 6, False)
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = Image.open(tmp_path / 'masks' / 'a.png')
    mask.save(tmp_path / 'masks' / 'a.png', exif=exif)
    image, mask = open_dataset('', str(tmp_path), 'train', hold_out=False)[0]
    assert mask.shape == (6, 4)
    assert torch.equal(image[0], mask * 60)


def test_a_transparent_image_is_composed_on_white(tmp_path):
    pixels = np.array([[[255, 0, 0, 0], [0, 255, 0, 255]]], np.uint8)
    save(tmp_path / 'images' / 'a.png', pixels)
    save(tmp_path / 'masks' / 'a.png', np.array([[0, 1]], np.uint8))
    image, _ = open_dataset('', str(tmp_path), 'train', hold_out=False)[0]
    assert image.permute(1, 2, 0).tolist() == [[[255, 255, 255], [0, 255, 0]]]


def test_what_macos_writes_beside_images_and_masks_is_left_alone(tmp_path):
    save_pair(tmp_path / 'images', tmp_path / 'masks', 'a', 3)
    for path in (tmp_path / 'images' / '._a.jpg', tmp_path / 'masks' / '._a.png', tmp_path / 'images' / '._b.jpg'):
        path.write_bytes(b'\0\5\x16\7')
    assert classes_of(open_dataset('', str(tmp_path), 'train', hold_out=False)) == [3]


def test_damage_that_pil_reports_by_a_syntax_error_names_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    path = save(tmp_path / 'images' / 'a.png', noise)
    save(tmp_path / 'masks' / 'a.png', np.zeros((32, 32), np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf'can be read for {tmp_path}/masks/a\.png'):
        open_dataset('', str(tmp_path), 'train', hold_out=False)[0]


def test_names_and_number_of_classes_come_from_where_they_are_best_known(tmp_path):
    save_voc(tmp_path, {'train': [1]})
    (tmp_path / 'classes.txt').write_text('ground\ntree\n\n')
    dataset = open_dataset('', str(tmp_path), 'train')
    assert (dataset.num_classes, dataset.class_names) == (2, ['ground', 'tree'])
    dataset = open_dataset('', str(tmp_path), 'train', class_names=['x', 'y', 'z'])
    assert (dataset.num_classes, dataset.class_names) == (3, ['x', 'y', 'z'])
    with pytest.raises(ValueError, match='a name for each of 4 classes, got 2: ground, tree'):
        open_dataset('', str(tmp_path), 'train', num_classes=4)
    with pytest.raises(ValueError, match='Expected 1 to 255 classes'):
        open_dataset('', str(tmp_path), 'train', num_classes=256)
    with pytest.raises(ValueError, match='Expected img_mode as one of RGB, L'):
        open_dataset('', str(tmp_path), 'train', img_mode='CMYK')


def test_a_data_set_hands_over_tensors_and_lets_a_transform_replace_them(tmp_path):
    save_pair(tmp_path / 'images', tmp_path / 'masks', 'a', 3)
    dataset = open_dataset('', str(tmp_path), 'train', hold_out=False, reduce_zero_label=True)
    image, mask = dataset[0]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert (image.dtype, image.shape, mask.shape) == (torch.uint8, (3, 4, 6), (4, 6))
    assert mask.unique().tolist() == [2]
    assert dataset.num_classes == 3
    dataset.transform = lambda image, mask: (mask, image)
    assert isinstance(pickle.loads(pickle.dumps(dataset.source)).name(0), str)
    assert dataset[0][0].shape == (4, 6)
    assert open_dataset('', str(tmp_path), 'train', hold_out=False, img_mode='L')[0][0].shape == (1, 4, 6)


def test_voc_of_torchvision(tmp_path):
    save_voc(tmp_path / 'VOCdevkit' / 'VOC2012', {'train': [3, 1], 'val': [20]})
    dataset = open_dataset('torch/voc_segmentation', str(tmp_path), 'validation')
    assert classes_of(dataset) == [20]
    assert dataset.class_names == list(VOC_CLASSES)
    assert dataset.source.name(0).endswith('SegmentationClass/2007_000020.png')
    with pytest.raises(ValueError, match='val split of torch/voc_segmentation in .*download'):
        open_dataset('torch/voc_segmentation', str(tmp_path / 'nowhere'), 'val')


def test_pets_of_torchvision_count_from_0(tmp_path):
    folder = tmp_path / 'oxford-iiit-pet'
    save(folder / 'images' / 'Beagle_1.jpg', np.zeros((1, 3, 3), np.uint8))
    save(folder / 'annotations' / 'trimaps' / 'Beagle_1.png', np.array([[1, 2, 3]], np.uint8))
    (folder / 'annotations' / 'trainval.txt').write_text('Beagle_1 1 2 1\n')
    dataset = open_dataset('torch/oxford_iiit_pet', str(tmp_path), 'train')
    assert dataset[0][1].tolist() == [[0, 1, 2]]
    assert dataset.class_names == ['pet', 'background', 'border']
    assert dataset.source.name(0) == 'torch/oxford_iiit_pet trainval[0]'


def test_cityscapes_of_torchvision_have_the_classes_to_train_on(tmp_path):
    for city, brightness in {'ulm': 200, 'aachen': 10}.items():
        image = np.full((1, 34, 3), brightness, np.uint8)
        save(tmp_path / 'leftImg8bit' / 'val' / city / f'{city}_0_leftImg8bit.png', image)
        values = np.arange(34, dtype=np.uint8)[None]
        save(tmp_path / 'gtFine' / 'val' / city / f'{city}_0_gtFine_labelIds.png', values)
    dataset = open_dataset('torch/cityscapes', str(tmp_path), 'validation')
    expected = [255] * 34
    for train_id, value in enumerate([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]):
        expected[value] = train_id
    assert dataset[0][1].tolist() == [expected]
    assert dataset.num_classes == 19
    assert dataset.class_names[:2] == ['road', 'sidewalk']
    assert dataset.class_names[18] == Cityscapes.classes[33].name == 'bicycle'
    assert [dataset.source.name(i).split('/')[-2] for i in range(2)] == ['aachen', 'ulm']
    assert [int(image.max()) for image, _ in dataset] == [10, 200]
    with pytest.raises(ValueError, match='download=True'):
        open_dataset('torch/cityscapes', str(tmp_path), 'val', download=True)


def test_sbd_of_torchvision(tmp_path):
    savemat = pytest.importorskip('scipy.io').savemat
    save(tmp_path / 'img' / 'a.jpg', np.full((4, 6, 3), 50, np.uint8))
    (tmp_path / 'cls').mkdir()
    savemat(tmp_path / 'cls' / 'a.mat', {'GTcls': {'Segmentation': np.full((4, 6), 5, np.uint8)}})
    (tmp_path / 'train.txt').write_text('a\n')
    dataset = open_dataset('torch/sbd', str(tmp_path), 'train')
    assert classes_of(dataset) == [5]
    assert dataset.num_classes == 21


def test_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match='one of the data sets torch/voc_segmentation, .*torch/cifar10'):
        open_dataset('torch/cifar10', str(tmp_path), 'train')
    with pytest.raises(ValueError, match="torch/... or hfds/..., .*'tfds/x'"):
        open_dataset('tfds/x', str(tmp_path), 'train')


def test_a_folder_of_hugging_face(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'label': datasets.Value('int64'), 'img': datasets.Image(), 'mask': datasets.Image()})
    for split, values in {'train': [1, 2, 3, 4], 'test': [5]}.items():
        images = [Image.new('RGB', (6, 4), (10 * value,) * 3) for value in values]
        masks = [Image.new('L', (6, 4), value) for value in values]
        table = {'label': values, 'img': images, 'mask': masks}
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / 'data' / f'{split}.parquet')
    name, cache = f'hfds/{tmp_path / "data"}', str(tmp_path / 'cache')
    dataset = open_dataset(name, cache, 'train')
    assert classes_of(dataset) == [1, 2, 3, 4]
    assert dataset.num_classes == 5
    assert dataset.source.name(2) == f'{name} train[2]'
    assert classes_of(open_dataset(name, cache, 'validation')) == [5]
    assert classes_of(open_dataset(name, cache, 'train[:50%]', num_classes=6)) == [1, 2]
    assert open_dataset(name, cache, 'train', num_classes=6, input_key='mask').source.image_column == 'mask'
    with pytest.raises(ValueError, match='images called label .*Choose with target_key'):
        open_dataset(name, cache, 'train', target_key='label')
    with pytest.raises(ValueError, match='could not load its split train'):
        open_dataset(f'hfds/{tmp_path / "nowhere"}', cache, 'train')
