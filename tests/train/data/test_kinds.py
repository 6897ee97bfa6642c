"""Runs on data of other kinds: folders of images, and torchvision"""

import logging
import struct
import tarfile

import pytest
import timm
import torch
from runs import results_of, train
from tiny_data import write_folders

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import create_datasets


def write_idx(path, values):
    shape = struct.pack(f'>{values.ndim}I', *values.shape)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + shape + values.numpy().tobytes())


def test_a_data_set_of_torchvision_trains(tmp_path, messages, read_csv):
    raw = tmp_path / 'data' / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for split, count in (('train', 40), ('t10k', 20)):
        write_idx(raw / f'{split}-images-idx3-ubyte', torch.randint(256, (count, 28, 28)).byte())
        write_idx(raw / f'{split}-labels-idx1-ubyte', torch.arange(count).remainder(10).byte())
    flags = ['--dataset', 'torch/fashion_mnist', '--coretune', '--class-balance', '--label-fraction', 0.5]
    train(tmp_path / 'data', tmp_path, *flags, '--in-chans', 1)
    assert 'Training: 20 images of 10 classes, 2 to 2 a class' in messages()
    assert len(read_csv(tmp_path / 'run' / 'summary.csv')) == 2
    assert timm.create_model(
        'test_resnet', num_classes=10, in_chans=1, checkpoint_path=str(tmp_path / 'run' / 'model_best.safetensors')
    )


def test_folders_of_images_are_counted_and_trained_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = write_folders(
        tmp_path / 'data', {f'{s}/{c}': 4 for s in ('train', 'validation') for c in ('ant', 'bee', 'cat')}
    )
    folder = train(data, tmp_path, '--coretune', '--epochs', 1, '-b', 12)
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'model_best.safetensors'))
    assert model.fc.weight.isfinite().all()


@pytest.mark.parametrize('kind', ['folders', 'tar'])
def test_validation_alone_sees_the_images_that_the_run_held_out(tmp_path, messages, kind):
    data = write_folders(tmp_path / 'data', {'ant': 30, 'bee': 20, 'cat': 10})
    if kind == 'tar':
        with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
            tar.add(data, arcname='.')
        data = tmp_path / 'data.tar'
    (*_, result) = results_of(data, tmp_path, '--epochs', 1, '--seed', 3)
    best = tmp_path / 'run' / 'model_best.safetensors'
    (again,) = results_of(data, tmp_path, '--eval-only', '--initial-checkpoint', best)
    assert again['validation'] == pytest.approx(result['validation'], rel=1e-5)
    assert {
        'Training: 54 images of 3 classes, 9 to 27 a class',
        'Validation: 6 images of 3 classes, 1 to 3 a class',
    } <= {*messages()}


def test_classes_that_differ_between_the_splits_are_named(tmp_path):
    counts = dict.fromkeys(('train/ant', 'train/bee', 'validation/ant', 'validation/cow'), 4)
    data = write_folders(tmp_path / 'data', counts)
    with pytest.raises(ValueError, match='in one only: bee, cow'):
        create_datasets(parse_args(['--data-dir', str(data)]).settings.data)
