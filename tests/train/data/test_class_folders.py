"""Folders and tar files of classes: what is read, what is left out, and what would be one class by mistake"""

import importlib.util
import tarfile

import numpy as np
import pytest
from PIL import Image
from runs import results_of
from timm.data.readers import add_img_extensions, del_img_extensions
from tiny_data import write_folders

from timm_coretune.data.images import IMAGE_ENDINGS, LabelledImages
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.class_folders import ReaderClassFolders, ReaderClassTar
from timm_coretune.train.data.datasets import create_datasets


def as_kind(folder, kind):
    """The folder itself, or a tar file of what is in it."""
    if kind == 'folder':
        return folder
    path = folder.with_suffix('.tar')
    with tarfile.open(path, 'w') as archive:
        archive.add(folder, arcname='.')
    return path


def open_data(path, *words):
    return create_datasets(parse_args(['--data-dir', str(path), *words]).settings.data)


KINDS = pytest.mark.parametrize('kind', ['folder', 'tar'])


# what is read


@KINDS
def test_images_of_every_kind_are_read_and_other_files_are_counted(tmp_path, messages, kind):
    data = write_folders(tmp_path / 'data', {'ant': 1, 'bee': 1})
    gradient = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for ending in IMAGE_ENDINGS:
        Image.fromarray(gradient).save(data / 'ant' / f'a{ending.upper()}', None if ending != '.jfif' else 'JPEG')
    for name in ('ant/photo.HEIC', 'ant/photo2.heic', 'bee/notes.txt', 'bee/README'):
        (data / name).write_bytes(b'x')
    (data / 'bee' / '.DS_Store').write_bytes(b'x')
    reader = (ReaderClassFolders if kind == 'folder' else ReaderClassTar)(str(as_kind(data, kind)))
    assert len(reader) == 2 + len(IMAGE_ENDINGS)
    images = LabelledImages(None, reader, input_img_mode='L')
    shown = [np.asarray(images[index][0]) for index in range(len(images))]
    assert sum(np.abs(image.astype(int) - gradient).mean() < 3 for image in shown) == len(IMAGE_ENDINGS)
    (warning,) = messages('WARNING')
    assert '4 file(s) of ' in warning
    assert '.heic (2), no ending (1), .txt (1). Convert them to JPEG, PNG or WebP' in warning


def test_files_that_are_surely_no_images_are_no_warning(tmp_path, messages):
    data = write_folders(tmp_path / 'data', {'ant': 1, 'bee': 1})
    (data / 'ant' / 'labels.csv').write_text('x')
    ReaderClassFolders(str(data))
    assert messages('WARNING') == []
    assert any('1 file(s) of' in message and '.csv (1)' in message for message in messages())


def test_endings_that_a_script_adds_to_timm_are_read_too(tmp_path):
    data = write_folders(tmp_path / 'data', {'ant': 2, 'bee': 1})
    (data / 'ant' / '0.png').rename(data / 'ant' / '0.mine')
    assert len(ReaderClassFolders(str(data))) == 2
    add_img_extensions('.mine')
    try:
        assert len(ReaderClassFolders(str(data))) == 3
    finally:
        del_img_extensions('.mine')


@KINDS
def test_data_without_images_name_the_endings_that_are_read(tmp_path, kind):
    (tmp_path / 'data' / 'ant').mkdir(parents=True)
    (tmp_path / 'data' / 'ant' / 'a.heic').write_bytes(b'x')
    with pytest.raises(ValueError, match=r'found none with the endings \.png, .*\.webp'):
        (ReaderClassFolders if kind == 'folder' else ReaderClassTar)(str(as_kind(tmp_path / 'data', kind)))


def test_a_tar_file_that_is_cut_is_named(tmp_path):
    path = as_kind(write_folders(tmp_path / 'data', {'ant': 9, 'bee': 1}, size=64), 'tar')
    (tmp_path / 'none.tar').write_bytes(b'no tar file' * 99)
    path.write_bytes(path.read_bytes()[:3000])
    for broken in (path, tmp_path / 'none.tar'):
        with pytest.raises(ValueError, match=f'Expected a whole tar file in .*{broken.name}'):
            ReaderClassTar(str(broken))


# what would be one class


@KINDS
def test_folders_of_one_name_are_not_one_class_in_silence(tmp_path, kind):
    data = write_folders(tmp_path / 'data', {'ant/images': 4, 'bee/images': 3, 'cat/images': 2})
    with pytest.raises(ValueError, match='found 9 images in 3 folders that are all called .images.') as error:
        open_data(as_kind(data, kind), '--val-split=')
    assert 'ant/images (4), bee/images (3), cat/images (2)' in str(error.value)
    assert '--dataset torch/image_folder' in str(error.value)
    assert len(open_data(data, '--val-split=', '--dataset', 'torch/image_folder').class_names) == 3  # as it says


@KINDS
def test_classes_made_of_several_folders_are_named(tmp_path, messages, kind):
    data = write_folders(tmp_path / 'data', {'here/ant': 4, 'there/ant': 3, 'here/bee': 2, 'there/bee': 2, 'cow': 2})
    assert open_data(as_kind(data, kind), '--val-split=').class_names == ['ant', 'bee', 'cow']
    (warning,) = [message for message in messages('WARNING') if 'ARE ONE CLASS' in message]
    assert "'ant' is made of here/ant (4), there/ant (3), and so are 1 more" in warning


@KINDS
def test_classes_below_other_folders_are_no_reason_to_warn(tmp_path, messages, kind):
    counts = {f'{split}/{folder}': 2 for split in ('train', 'val') for folder in ('insects/ant', 'birds/tit', 'cow')}
    datasets = open_data(as_kind(write_folders(tmp_path / 'data', counts), kind))
    assert datasets.class_names == ['ant', 'cow', 'tit']
    assert [message for message in messages('WARNING') if 'ONE CLASS' in message] == []


@pytest.mark.parametrize('flags', [(), ('--num-classes', 1)], ids=['alone', 'asked-for'])
def test_one_class_is_not_trained(tmp_path, flags):
    data = write_folders(tmp_path / 'data', {'train/ant': 10, 'validation/ant': 2})
    message = "Expected images of two classes or more, all 10 training images are of one class, 'ant'"
    with pytest.raises(ValueError, match=message):
        results_of(data, tmp_path, *flags)


def test_one_class_of_several_that_are_named_is_warned_of(tmp_path, messages):
    data = write_folders(tmp_path / 'data', {'train/ant': 10, 'validation/ant': 2})
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    for flags in (('--class-map', tmp_path / 'names.txt'), ('--num-classes', 2)):
        results_of(data, tmp_path, '--epochs', 1, *flags)
    assert sum('ONE CLASS: all 10 training images' in message for message in messages('WARNING')) == 2
    results_of(data, tmp_path, '--eval-only')  # a validation may lack classes
    assert sum('ONE CLASS' in message for message in messages('WARNING')) == 2


# what is not installed


@pytest.mark.parametrize('kind, package', [('wds', 'webdataset'), ('tfds', 'tensorflow-datasets')])
def test_a_package_that_is_missing_is_named_and_nothing_else(tmp_path, kind, package):
    if importlib.util.find_spec(package.replace('-', '_')) is not None:
        pytest.skip(f'{package} is installed')
    with pytest.raises(ImportError) as error:
        open_data(tmp_path, '--dataset', f'{kind}/owner/name')
    assert str(error.value) == f'Data sets of {kind}/ need {package.replace("-", "_")}: pip install {package}'
