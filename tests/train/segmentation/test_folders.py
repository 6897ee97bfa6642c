"""train.py --segmentation on folders of images of any size, and on masks that are wrong"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from runs import results_of
from safetensors.torch import load_file
from segmentation_runs import FIGURES, FLAGS, NAMES, SIZE, last_row, train, write_odd

import timm_coretune
from timm_coretune.segmentation import predict_image


@pytest.mark.parametrize('layout', ['voc', 'pair'])
@pytest.mark.parametrize('given', ['classes.txt', '--class-map', 'shifted'])
def test_images_of_any_size_are_trained_on_under_the_names_of_their_classes(tmp_path, layout, given, read_csv):
    data = write_odd(tmp_path / 'data', layout, first_class=given == 'shifted')
    names = tmp_path / ('names.txt' if given == '--class-map' else 'data/classes.txt')
    names.write_text('\n'.join(NAMES) + '\n\n')
    flags = {'--class-map': ['--class-map', names], 'shifted': ['--reduce-zero-label']}.get(given, [])
    folder = train(data, tmp_path, '--coretune', *flags)
    rows = read_csv(folder / 'per_class.csv')
    assert [row['class'] for row in rows] == NAMES
    # the first image is validated on, 50 x 37 made 64 x 47
    mask = Image.open(next(data.glob('[mS]*/0.png'))).resize((64, 47), Image.Resampling.NEAREST)
    counts = np.bincount(np.array(mask).flatten(), minlength=256)[given == 'shifted' :][:3]
    assert [int(row['pixels']) for row in rows] == counts.tolist()
    assert all(math.isfinite(value) for value in last_row(folder).values())


def test_a_run_on_few_values_is_scored_alike_afterwards(tmp_path, read_csv):
    data = write_odd(tmp_path / 'data', 'pair')
    for path in (data / 'masks').iterdir():
        Image.open(path).point([0, 10, 200, *range(3, 256)]).save(path)
    folder = train(data, tmp_path, '--coretune', '--remap-masks')
    assert [row['class'] for row in read_csv(folder / 'per_class.csv')] == ['0', '10', '200']
    checkpoint = folder / 'model_best.safetensors'
    flags = ['--remap-masks', '--eval-only', '--initial-checkpoint', checkpoint]
    (result,) = results_of(data, tmp_path, *flags, base=FLAGS)
    assert result['validation'] == pytest.approx({name: last_row(folder)[f'eval_{name}'] for name in FIGURES}, rel=1e-5)


def test_grey_images_are_trained_on_and_predicted_in_one_channel(tmp_path, steps):
    data = write_odd(tmp_path / 'data', 'pair')
    flags = ['--in-chans', 1, '--no-aug', '--num-classes', 3, '--interpolation', 'nearest']
    folder = train(data, tmp_path, *flags, '-b', 9)
    ((inputs, targets, *_),) = steps
    assert inputs.shape == (9, 1, SIZE, SIZE)
    colors = [Image.new('RGB', (1, 1), (20 + c, 40 + c, 60 + c)).convert('L').getpixel((0, 0)) for c in (0, 80, 160)]
    for c, color in enumerate(colors):
        of_class = inputs[:, 0][targets == c]
        assert torch.allclose(of_class, torch.tensor((color / 255 - 0.5) / 0.5))
    model = timm_coretune.load_segmentation_model(folder)
    assert predict_image(model, Image.open(data / 'images' / '1.png')).shape == (64, 81)
    assert (folder / 'segmentation.png').exists()


@pytest.mark.parametrize('flags', [['--coretune'], []], ids=['coretune', 'plain'])
def test_batches_without_a_pixel_that_counts_leave_no_trace(tmp_path, flags):
    data = write_odd(tmp_path / 'data', 'pair', borders_only=True)
    folder = train(data, tmp_path, *flags, '--num-classes', 3, '--model-kwargs', 'output_stride=16')
    assert last_row(folder)['train_loss'] == 0
    weights = load_file(folder / 'model_best.safetensors')
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize('workers', [0, 1])
def test_a_mask_with_a_value_out_of_range_stops_the_run_with_its_name(tmp_path, workers):
    data = write_odd(tmp_path / 'data', 'voc')
    (data / 'classes.txt').write_text('\n'.join(NAMES))
    mask = np.array(Image.open(data / 'SegmentationClass' / '4.png'))
    mask[5, 6] = 77
    Image.fromarray(mask).save(data / 'SegmentationClass' / '4.png')
    path = data / 'SegmentationClass' / '4.png'
    with pytest.raises(ValueError, match=f'Expected classes 0 to 2, or 255 .*, got the value 77 in {path}'):
        train(data, tmp_path, '-b', 9, '--coretune', '--workers', workers)


@pytest.mark.parametrize('layout', ['voc', 'pair'])
def test_images_that_are_trained_on_are_not_validated_on(tmp_path, layout):
    data = write_odd(tmp_path / 'data', layout)
    (data / 'classes.txt').write_text('\n'.join(NAMES))
    lists = data / 'ImageSets' / 'Segmentation' if layout == 'voc' else data
    stems = [path.stem for path in sorted(data.glob('[mS]*/*.png'))]
    (lists / 'trainval.txt').write_text('\n'.join(stems))
    (lists / 'val.txt').write_text('\n'.join(stems[:2]))
    with pytest.raises(ValueError, match='2 of the 2 validation images are trained on'):
        train(data, tmp_path, '-b', 9, '--train-split', 'trainval', '--val-split', 'val')


def test_a_mask_of_another_size_stops_the_run_with_its_name(tmp_path):
    data = write_odd(tmp_path / 'data', 'pair')
    path = data / 'masks' / '3.png'
    Image.open(path).resize((64, 63)).save(path)
    with pytest.raises(ValueError, match=f'a mask of 64 x 64 pixels, as its image has, got 64 x 63 in {path}'):
        train(data, tmp_path, '-b', 9, '--coretune')
