"""Transforms of images with masks, and the made scenes."""

import hashlib

import numpy as np
import pytest
import torch
from paths import SAMPLE
from PIL import Image
from safetensors.numpy import save_file
from torchvision import tv_tensors

from timm_coretune.segmentation.data.dataset import open_dataset
from timm_coretune.segmentation.data.scenes import FashionScenes, write_voc
from timm_coretune.segmentation.data.transforms import (
    create_eval_transform,
    create_train_transform,
    fitted_size,
    restore,
)

ZERO, ONE = (0.0,) * 3, (1.0,) * 3
SIZES = [(1, 1), (1, 50), (50, 1), (7, 31), (33, 32), (100, 64)]


def make_pair(height, width, values=(0, 3, 9, 20, 255)):
    """An image whose colours are the classes of its mask."""
    mask = torch.tensor(values)[torch.randint(len(values), (height, width))].to(torch.uint8)
    return tv_tensors.Image(mask[None].repeat(3, 1, 1)), tv_tensors.Mask(mask)


def make_halves(height, width, edge):
    """A dark and a bright half with classes 0 and 1."""
    mask = (torch.arange(width) >= edge).to(torch.uint8).repeat(height, 1)
    return tv_tensors.Image(mask[None].repeat(3, 1, 1) * 255), tv_tensors.Mask(mask)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('create', [create_train_transform, create_eval_transform])
def test_every_size_gives_the_same_shapes_and_only_values_of_the_mask(create, size):
    image, mask = make_pair(*size)
    before = mask.clone()
    new_image, new_mask = create((24, 40), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))(image, mask)
    assert (new_image.dtype, new_image.shape) == (torch.float32, (3, 24, 40))
    assert (new_mask.dtype, new_mask.shape) == (torch.int64, (24, 40))
    assert type(new_image) is type(new_mask) is torch.Tensor
    assert set(new_mask.unique().tolist()) <= {*before.unique().tolist(), 255}
    assert torch.equal(mask, before)


@pytest.mark.parametrize('size', SIZES)
def test_image_and_mask_stay_on_each_other_through_crops_and_flips(size):
    transform = create_train_transform((24, 40), ZERO, ONE, vflip=0.5, interpolation='nearest')
    for _ in range(20):
        image, mask = transform(*make_pair(*size))
        assert torch.equal((image[0] * 255).round().long(), mask)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_a_mask_is_not_shifted_against_the_interpolated_image(interpolation):
    train = create_train_transform((16, 16), ZERO, ONE, scale=(1, 1), ratio=(1, 1), interpolation=interpolation)
    evaluation = create_eval_transform((16, 16), ZERO, ONE, interpolation)
    for transform in (train, evaluation):
        for edge in (30, 31, 33):  # not on an edge of the new pixels, which hold four old ones
            image, mask = transform(*make_halves(64, 64, edge))
            differing = (image[0] > 0.5).long() != mask
            assert not differing.any(), f'edge {edge}'


def test_flips_and_colours_are_drawn_from_the_global_generator():
    transform = create_train_transform((16, 16), ZERO, ONE, vflip=0.5, color_jitter=0.5)
    pair = make_pair(20, 20)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(transform(*pair))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[2][0])


@pytest.mark.parametrize('hflip, vflip, dims', [(1.0, 0.0, [1]), (0.0, 1.0, [0]), (0.0, 0.0, [])])
def test_flips_have_their_probability(hflip, vflip, dims):
    image, mask = make_pair(16, 16)
    transform = create_train_transform((16, 16), ZERO, ONE, (1, 1), (1, 1), hflip=hflip, vflip=vflip)
    assert torch.equal(transform(image, mask)[1], mask.long().flip(dims))


def test_colours_change_the_image_alone():
    image, mask = make_pair(16, 16, values=(40, 90))
    transform = create_train_transform((16, 16), ZERO, ONE, (1, 1), (1, 1), hflip=0, color_jitter=0.9)
    new_image, new_mask = transform(image, mask)
    assert torch.equal(new_mask, mask.long())
    assert not torch.allclose(new_image * 255, image.float(), atol=5)


def test_evaluation_keeps_the_aspect_ratio_and_fills_with_the_mean_and_ignored_pixels():
    image = tv_tensors.Image(torch.tensor([51, 102, 204], dtype=torch.uint8)[:, None, None].expand(3, 10, 40))
    mask = tv_tensors.Mask(torch.full((10, 40), 3, dtype=torch.uint8))
    new_image, new_mask = create_eval_transform((32, 20), (0.1, 0.2, 0.3), (0.5, 0.5, 0.25))(image, mask)
    colour = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.5, (0.8 - 0.3) / 0.25])
    assert torch.allclose(new_image[:, :5], colour[:, None, None].expand(3, 5, 20), atol=1e-6)
    assert new_image[:, 5:].eq(0).all()
    assert new_mask[:5].eq(3).all()
    assert new_mask[5:].eq(255).all()


@pytest.mark.parametrize(
    'size, expected',
    [((10, 40), (5, 20)), ((64, 10), (32, 5)), ((32, 20), (32, 20)), ((1, 1), (20, 20)), ((999, 1), (32, 1))],
)
def test_content_fits(size, expected):
    assert fitted_size(size, (32, 20)) == expected


def test_restored_logits_predict_the_mask_that_went_in():
    for size in [(30, 64), (64, 30), (8, 8), (1, 40), (200, 120)]:
        image, mask = make_halves(*size, edge=size[1] // 2)
        fitted = create_eval_transform((48, 48), ZERO, ONE)(image, mask)[1]
        logits = torch.nn.functional.one_hot(fitted.clamp(max=2), 3).permute(2, 0, 1).float()  # class 2 is the padding
        prediction = restore(logits, size)
        assert prediction.shape == (3, *size)
        assert prediction.argmax(0).ne(2).all()
        assert prediction.argmax(0).ne(mask).float().mean() <= 2 / size[1]


def test_one_channel_and_unknown_interpolations():
    image, mask = tv_tensors.Image(torch.zeros(1, 9, 9, dtype=torch.uint8)), tv_tensors.Mask(torch.zeros(9, 9).byte())
    for create in (create_train_transform, create_eval_transform):
        assert create((8, 8), (0.5,), (0.5,))(image, mask)[0].eq(-1).all()
        with pytest.raises(ValueError, match="one of nearest, bilinear, bicubic, got 'lanczos'"):
            create((8, 8), (0.5,), (0.5,), interpolation='lanczos')


def digest_of(pair):
    return hashlib.sha256(b''.join(np.asarray(part).tobytes() for part in pair)).hexdigest()


def test_a_scene_hangs_on_split_and_index_alone():
    train, again = FashionScenes(SAMPLE, 'train'), FashionScenes(SAMPLE, 'training', num_scenes=9)
    np.random.seed(1)  # noqa: NPY002, which must not matter
    wanted = [digest_of(train.load(index)) for index in range(5)]
    np.random.seed(2)  # noqa: NPY002
    assert [digest_of(again.load(index)) for index in (4, 3, 2, 1, 0)] == wanted[::-1]
    assert len(set(wanted)) == 5
    assert digest_of(FashionScenes(SAMPLE, 'validation').load(0)) != wanted[0]
    assert (len(train), len(again), len(FashionScenes(SAMPLE, 'val'))) == (480, 9, 120)


def test_scenes_are_balanced_and_their_masks_valid():
    dataset = open_dataset('', SAMPLE, 'train')
    assert (dataset.num_classes, len(dataset.class_names), dataset.class_names[0]) == (11, 11, 'background')
    scenes_with, pixels = np.zeros(256), np.zeros(256)
    for image, mask in dataset:
        assert (image.shape, image.dtype) == ((3, 96, 96), torch.uint8)
        counts = np.bincount(mask.flatten(), minlength=256)
        scenes_with += counts > 0
        pixels += counts
    garments = scenes_with[1:11]
    assert garments.min() > 70  # 110 are expected, from 1200 garments of 10 classes
    assert garments.max() < 150
    assert 0.5 < pixels[0] / pixels.sum() < 0.9
    assert 0 < pixels[255] / pixels.sum() < 0.1
    assert pixels[11:255].sum() == 0


def test_regions_of_a_scene_never_touch_without_an_ignored_pixel():
    source = FashionScenes(SAMPLE, 'train')
    for index in range(10):
        mask = np.asarray(source.load(index)[1]).tolist()
        for row in range(96):
            for column in range(96):
                for other in [(row, column + 1), (row + 1, column)]:
                    if max(other) < 96:
                        pair = {mask[row][column], mask[other[0]][other[1]]}
                        assert len(pair) == 1 or 255 in pair


def test_a_garment_lies_where_its_mask_is(tmp_path):
    path = str(tmp_path / 'white.safetensors')
    white = np.full((3, 28, 28), 255, np.uint8)
    save_file({'train.image': white, 'train.label': np.array([4, 4, 4])}, path)
    source = FashionScenes(path, 'train', num_scenes=20)
    assert source.class_names == ['background', '0', '1', '2', '3', '4']
    for index in range(20):
        image, mask = map(np.asarray, source.load(index))
        inside = image[mask == 5].astype(int)
        colours = {tuple(colour) for colour in inside.tolist()}
        assert 1 <= len(colours) <= 4  # one flat colour a garment, none of the texture
        assert len({tuple(colour) for colour in image[mask == 0].tolist()}) > 100


def test_what_holds_no_garments_is_refused(tmp_path):
    path = str(tmp_path / 'x.safetensors')
    with pytest.raises(ValueError, match='could not read'):
        open_dataset('', path, 'train')
    save_file({'train.image': np.zeros((2, 28, 28, 3), np.uint8), 'train.label': np.zeros(2, int)}, path)
    with pytest.raises(ValueError, match='Expected train.image as uint8'):
        open_dataset('', path, 'train')
    with pytest.raises(ValueError, match="a split 'validation'"):
        open_dataset('', path, 'validation')


def test_written_scenes_are_a_voc_folder(tmp_path):
    for split in ('train', 'validation'):
        source = FashionScenes(SAMPLE, split, num_scenes=3)
        write_voc(source, str(tmp_path / 'scenes'), split)
        dataset = open_dataset('', str(tmp_path / 'scenes'), split)
        assert dataset.class_names == source.class_names
        assert len(dataset) == 3
        for index, (image, mask) in enumerate(dataset):
            wanted_image, wanted_mask = map(np.asarray, source.load(index))
            assert np.array_equal(mask, wanted_mask)
            assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - wanted_image).mean() < 12  # JPEG
    with Image.open(tmp_path / 'scenes' / 'SegmentationClass' / 'train_00000.png') as image:
        assert image.mode == 'P'
    assert not list(tmp_path.rglob('*.tmp'))
