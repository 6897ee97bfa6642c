"""Which images are trained on and which are validated on: never the same, and never other than was asked for"""

import logging
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_data import write_folders, write_images

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.data.labelled import LabelledSubset, get_labels

CLASSES = ('ant', 'bee')


def folders(root, *splits, count=4):
    """Class folders in each of these splits, '' for the root itself."""
    return write_folders(root, {f'{split}/{name}'.lstrip('/'): count for split in splits for name in CLASSES})


def open_(root, *flags, with_training=True, seed=42):
    words = ['--data-dir', str(root), *map(str, flags)]
    return create_datasets(parse_args(words).settings.data, with_training, seed)


def files(dataset):
    """The files of a data set in its order, found by walking through its parts."""
    if isinstance(dataset, LabelledSubset):
        whole = files(dataset.dataset)
        return [whole[index] for index in dataset.indices]
    return [os.path.realpath(path) for path, _ in dataset.reader.samples]


def below(root, *parts):
    return sorted(str(path.resolve()) for path in Path(root, *parts).rglob('*.png'))


@pytest.mark.parametrize(
    'train, validation',
    [
        ('train', 'validation'),
        ('train', 'val'),
        ('train', 'valid'),
        ('training', 'dev'),
        ('Train', 'Val'),
        ('TRAIN', 'Validation'),
        ('train', 'test'),
        ('Training', 'Test'),
    ],
)
def test_the_usual_names_of_splits_are_found(tmp_path, messages, train, validation):
    found = open_(folders(tmp_path, train, validation))
    assert sorted(files(found.train)) == below(tmp_path, train)
    assert sorted(files(found.validation)) == below(tmp_path, validation)
    assert found.class_names == list(CLASSES)
    warned = any('best epoch is chosen on test images' in message for message in messages('WARNING'))
    assert warned == (validation.lower() == 'test')


def test_a_validation_split_is_preferred_to_a_test_split(tmp_path, messages):
    found = open_(folders(tmp_path, 'train', 'test', 'val'))
    assert sorted(files(found.validation)) == below(tmp_path, 'val')
    assert not messages('WARNING')


@pytest.mark.parametrize('splits', [['train'], ['']], ids=['train-only', 'class-folders'])
def test_without_a_validation_split_a_share_of_each_class_is_held_out(tmp_path, messages, splits):
    folders(tmp_path, *splits, count=20)
    found, again = (open_(tmp_path, seed=seed) for seed in (1, 2))
    assert Counter(get_labels(found.validation)) == {0: 2, 1: 2}
    assert sorted(files(found.train) + files(found.validation)) == below(tmp_path)
    assert files(found.validation) == files(again.validation)  # else a run validates on images another was trained on
    assert any('held out' in message and '4 of the 40 images' in message for message in messages())
    assert files(open_(tmp_path, with_training=False).validation) == files(found.validation)
    found.train.transform, found.validation.transform = (lambda image: 'train'), (lambda image: 'validation')
    assert (found.train[0][0], found.validation[0][0]) == ('train', 'validation')


def test_the_share_that_is_held_out_can_be_chosen(tmp_path, messages):
    folders(tmp_path, 'train', 'test', count=10)
    found = open_(tmp_path, '--val-fraction', 0.3)
    assert Counter(get_labels(found.validation)) == {0: 3, 1: 3}
    assert sorted(files(found.train) + files(found.validation)) == below(tmp_path, 'train')
    whole = open_(tmp_path / 'test', '--eval-only', '--val-fraction', 1, with_training=False)
    assert sorted(files(whole.validation)) == below(tmp_path, 'test')


def test_a_validation_split_that_is_trained_on_by_name_is_held_out_from(tmp_path):
    folders(tmp_path, 'train', 'val', count=10)
    found = open_(tmp_path, '--train-split', 'val')
    assert sorted(files(found.train) + files(found.validation)) == below(tmp_path, 'val')
    assert len(found.validation) == 2


def test_a_class_of_one_image_keeps_it_for_training(tmp_path, messages):
    write_folders(tmp_path, {'ant': 1, 'bee': 3})
    found = open_(tmp_path)
    assert (Counter(get_labels(found.train)), Counter(get_labels(found.validation))) == ({0: 1, 1: 2}, {1: 1})
    assert any('1 class(es) of one image' in message for message in messages())


@pytest.mark.parametrize(
    'flags',
    [
        ['--val-split', 'tset'],
        ['--train-split', 'trian'],
        ['--train-split', 'trian', '--val-split', ''],
        ['--val-split', 'valid'],
    ],
    ids=' '.join,
)
@pytest.mark.parametrize('kind', ['folders', 'tar', 'safetensors', 'hfds'])
def test_a_split_that_is_named_and_not_there_is_an_error_that_lists_what_is_there(tmp_path, kind, flags):
    root, words = data_of(kind, tmp_path, 'train', 'val')
    with pytest.raises(ValueError, match='Expected the split .*which has train, val'):
        open_(root, *words, *flags)


def data_of(kind, tmp_path, *splits):
    """Data with these splits, and the flags that name it."""
    if kind == 'folders':
        return folders(tmp_path / 'data', *splits), []
    if kind == 'tar':
        folders(tmp_path / 'data', *splits, count=10)
        with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
            tar.add(tmp_path / 'data', arcname='.')
        return tmp_path / 'data.tar', []
    if kind == 'hfds':
        for number, split in enumerate(splits):
            pictures = [Image.new('RGB', (8, 8), (i, number, 0)) for i in range(20)]
            rows = Dataset.from_dict({'image': pictures, 'label': [i % 2 for i in range(20)]})
            (tmp_path / 'hub').mkdir(exist_ok=True)
            rows.to_parquet(tmp_path / 'hub' / f'{split}.parquet')
        return tmp_path / 'cache', ['--dataset', f'hfds/{tmp_path / "hub"}']
    path = write_images(tmp_path / 'a.safetensors', [10, 10], [4, 4] if len(splits) > 1 else None)
    if 'val' in splits:
        from safetensors.torch import load_file, save_file

        save_file({k.replace('validation', 'val'): v for k, v in load_file(path).items()}, path)
    return path, []


@pytest.mark.parametrize('kind', ['tar', 'safetensors', 'hfds'])
@pytest.mark.parametrize('splits', [['train', 'val'], ['train']], ids=' '.join)
def test_other_data_has_its_splits_or_holds_images_out(tmp_path, kind, splits):
    found = open_(*flatten(data_of(kind, tmp_path, *splits)))
    held_out = len(splits) == 1
    counts = Counter(get_labels(found.validation))
    assert counts[0] == counts[1] == (1 if held_out else {'tar': 10, 'safetensors': 4, 'hfds': 10}[kind])
    assert len(found.train) == 20 - 2 * held_out
    assert found.num_classes == 2


def flatten(data):
    return data[0], *data[1]


def test_a_tar_file_of_class_folders_is_held_out_from(tmp_path):
    root, _ = data_of('tar', tmp_path, '')
    found = open_(root)
    assert Counter(get_labels(found.train)) == {0: 9, 1: 9}
    assert Counter(get_labels(found.validation)) == {0: 1, 1: 1}
    assert (found.num_classes, found.class_names) == (2, list(CLASSES))
    names = [found.train.dataset.reader.paths[i] for i in (*found.train.indices, *found.validation.indices)]
    assert len(set(names)) == 20


@pytest.mark.parametrize(
    'flags, is_wrong',
    [
        (['--val-split', 'train'], True),
        (['--train-split', 'train[:80%]', '--val-split', 'train[70%:]'], True),
        (['--train-split', 'train[:80%]', '--val-split', 'train[80%:]'], False),
        (['--train-split', 'train+validation', '--val-split', 'validation'], True),
    ],
    ids=lambda flags: ' '.join(flags) if isinstance(flags, list) else '',
)
def test_parts_of_a_split_are_compared_row_by_row(tmp_path, flags, is_wrong):
    root, words = data_of('hfds', tmp_path, 'train', 'val')
    if is_wrong:
        with pytest.raises(ValueError, match='Expected training and validation images that|Expected two splits'):
            open_(root, *words, *flags)
    else:
        found = open_(root, *words, *flags)
        assert (len(found.train), len(found.validation)) == (16, 4)


@pytest.mark.parametrize('kind', ['folders', 'tar', 'safetensors'])
def test_a_split_that_is_trained_on_is_not_validated_on(tmp_path, kind):
    root, words = data_of(kind, tmp_path, 'train', 'val')
    with pytest.raises(ValueError, match="the split 'train' would be trained and validated on"):
        open_(root, *words, '--val-split', 'train')


def test_links_to_training_files_are_noticed(tmp_path):
    folders(tmp_path, 'train', 'val')
    link = tmp_path / 'val' / 'ant' / 'linked.png'
    link.symlink_to(tmp_path / 'train' / 'ant' / '0.png')
    with pytest.raises(ValueError, match='1 of the 9 validation images are trained on, such as .*train/ant/0.png'):
        open_(tmp_path)
    link.unlink()
    shutil.rmtree(tmp_path / 'val' / 'bee')
    (tmp_path / 'val' / 'bee').symlink_to(tmp_path / 'train' / 'bee')
    with pytest.raises(ValueError, match='4 of the 8 validation images are trained on'):
        open_(tmp_path)


def test_a_folder_without_a_training_split_is_no_training_data(tmp_path):
    folders(tmp_path, 'val')
    with pytest.raises(ValueError, match="Expected the split 'train' of --train-split in .*which has val"):
        open_(tmp_path)
    found = open_(tmp_path, with_training=False)
    assert sorted(files(found.validation)) == below(tmp_path, 'val')


def test_a_test_folder_without_class_folders_is_no_split(tmp_path, messages):
    folders(tmp_path, 'train', count=10)
    (tmp_path / 'test').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'test' / '0.png')
    found = open_(tmp_path)
    assert sorted(files(found.train) + files(found.validation)) == below(tmp_path, 'train')
    assert any('No class folders are in test' in message for message in messages())


def test_splits_of_unusual_names_are_noticed(tmp_path, messages):
    found = open_(folders(tmp_path, 'trn', 'tst', count=5))
    assert len(found.train) + len(found.validation) == 20
    assert any('trn, tst of' in message and 'name them as' in message for message in messages('WARNING'))


def test_folders_with_the_name_of_a_split_may_be_classes(tmp_path):
    write_folders(tmp_path / 'vehicles', {'car': 10, 'train': 10, 'test': 10})
    found = open_(tmp_path / 'vehicles')
    assert (found.class_names, len(found.train), len(found.validation)) == (['car', 'test', 'train'], 27, 3)
    write_folders(tmp_path / 'unlabelled', {'train': 3, 'test': 3})
    with pytest.raises(ValueError, match='found no folders there. A split is a folder of class folders'):
        open_(tmp_path / 'unlabelled')


@pytest.mark.parametrize('flags', [['--train-split', 'trian'], ['--val-split', 'tset']], ids=' '.join)
def test_data_of_torchvision_has_the_splits_that_it_has(tmp_path, flags):
    with pytest.raises(ValueError, match='Expected the split .* in torch/mnist, which has train, test'):
        open_(tmp_path, '--dataset', 'torch/mnist', *flags)


def test_folders_read_by_torchvision_have_splits_too(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folders(tmp_path, 'Train', count=10)
    found = open_(tmp_path, '--dataset', 'torch/image_folder')
    assert Counter(get_labels(found.validation)) == {0: 1, 1: 1}
    assert len(found.train) == 18
    with pytest.raises(ValueError, match='which has Train'):
        open_(tmp_path, '--dataset', 'torch/image_folder', '--val-split', 'tset')
    found.train.transform = lambda image: torch.zeros(1)
    assert found.validation[0][0].size == (16, 16)


def test_without_validation_all_images_are_trained_on(tmp_path):
    folders(tmp_path, '')
    found = open_(tmp_path, '--val-split', '')
    assert sorted(files(found.train)) == below(tmp_path)
    assert found.validation is None
