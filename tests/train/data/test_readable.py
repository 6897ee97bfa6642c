"""Images that cannot be read are left out, counted and named; validation refuses them unless told to skip them"""

import io
import logging
import os
import re
import tarfile
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from ranks import launch_ranks
from runs import results_of, train
from tiny_data import write_folders
from torchvision.datasets import VisionDataset

from timm_coretune.data.images import ImageStream, UnreadableImageError
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data import readable
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.data.labelled import ConvertedImages, get_labels

TORCHVISION = ('--dataset', 'torch/image_folder')


def noise(seed, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def write_noise(root, names, count):
    """As write_folders, but of noise, whose files are so long that damage in the middle hits pixels."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            noise(100 * number + index).save(root / name / f'{index}.png')
    return root


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])
    return path


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    return path


def open_data(root, *flags):
    return create_datasets(parse_args(['--data-dir', str(root), *map(str, flags)]).settings.data)


@pytest.fixture
def folders(tmp_path):
    return write_noise(tmp_path / 'data', [f'{split}/{name}' for split in ('train', 'validation') for name in 'ab'], 6)


def test_training_images_are_left_out_counted_and_named_once(folders, tmp_path, caplog, read_csv):
    broken = [cut(folders / 'train' / 'a' / '3.png'), folders / 'train' / 'b' / '0.png']
    broken[1].write_text('<html>')
    train(folders, tmp_path, '-b', 5, '--coretune', '--workers', 1)
    assert len(read_csv(tmp_path / 'run' / 'summary.csv')) == 2
    warned = [record.message for record in caplog.records if record.levelname == 'WARNING']
    assert '2 of 12 training images cannot be read and are left out of the training:' in warned
    for path in broken:
        assert len([message for message in warned if str(path) in message]) == 1


@pytest.mark.parametrize('flags', [(), ('--class-balance', '-b', 4), ('--label-fraction', 0.5)], ids=str)
def test_no_image_takes_the_place_of_another(folders, flags):
    for name in 'ab':
        cut(folders / 'train' / name / '0.png')
    datasets = open_data(folders, *flags)
    seen = [np.array(datasets.train[index][0]).tobytes() for index in range(len(datasets.train))]
    assert len(set(seen)) == len(seen) == (4 if '--label-fraction' in flags else 10)
    labels = get_labels(datasets.train)
    assert labels.count(0) == labels.count(1) == len(seen) // 2
    assert [datasets.train[index][1] for index in range(len(seen))] == labels
    assert datasets.num_classes == 2


def test_a_validation_image_that_cannot_be_read_is_an_error_with_all_paths(folders):
    broken = [cut(folders / 'validation' / 'b' / f'{index}.png') for index in range(6)]
    with pytest.raises(ValueError, match='6 of 12 cannot.*--skip-unreadable') as caught:
        open_data(folders)
    assert all(str(path) in str(caught.value) for path in broken)


def test_skipped_images_are_in_no_score(folders, tmp_path, caplog):
    folder = train(folders, tmp_path, '--epochs', 1, '--no-aug')
    broken = [cut(folders / 'validation' / 'b' / f'{index}.png') for index in range(5)]
    damage(folders / 'validation' / 'b' / '5.png')  # only its pixels tell
    checkpoint = str(folder / 'model_best.safetensors')
    flags = ('--eval-only', '--initial-checkpoint', checkpoint, '--skip-unreadable', '--metrics', 'per-class')
    (row,) = results_of(folders, tmp_path, *flags)
    assert '6 of 12 validation images cannot be read and are left out of all scores of the validation:' in caplog.text
    assert str(broken[0]) in caplog.text
    # timm alone, on the images of class a
    model = timm.create_model('test_resnet', num_classes=2, checkpoint_path=checkpoint).eval()
    config = timm.data.resolve_data_config({'img_size': 32}, model=model)
    transform = timm.data.create_transform(**config)
    images = [Image.open(folders / 'validation' / 'a' / f'{index}.png').convert('RGB') for index in range(6)]
    with torch.inference_mode():
        logits = model(torch.stack([transform(image) for image in images]))
    assert row['validation']['top1'] == pytest.approx(100 * (logits.argmax(1) == 0).float().mean().item())
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.int64)).item()
    assert row['validation']['loss'] == pytest.approx(expected, rel=1e-4)


def test_scores_of_photos_and_transparent_images_are_those_of_what_a_viewer_shows(tmp_path):
    data = write_noise(tmp_path / 'data', [f'{split}/{name}' for split in ('train', 'validation') for name in 'ab'], 4)
    for number, path in enumerate(sorted(data.glob('validation/*/*.png'))):
        image = noise(number, 40).resize((40, 30))
        if number % 2:
            image.putalpha(noise(50 + number, 40).resize((40, 30)).convert('L'))
        exif = Image.Exif()
        exif[0x0112] = 1 + number
        image.save(path, exif=exif)
    folder = train(data, tmp_path, '--epochs', 1, '--no-aug')
    checkpoint = str(folder / 'model_best.safetensors')
    (row,) = results_of(data, tmp_path, '--eval-only', '--initial-checkpoint', checkpoint)
    # timm alone
    model = timm.create_model('test_resnet', num_classes=2, checkpoint_path=checkpoint).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({'img_size': 32}, model=model))
    logits, labels = [], []
    for path in sorted(data.glob('validation/*/*.png')):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode == 'RGBA':
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
        with torch.inference_mode():
            logits.append(model(transform(image)[None]))
        labels.append(int(path.parent.name == 'b'))
    logits, labels = torch.cat(logits), torch.tensor(labels)
    assert row['validation']['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert row['validation']['loss'] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
    )


def test_damage_inside_a_file_stops_the_run_by_name_or_is_found_first(folders, caplog):
    path = damage(folders / 'train' / 'a' / '2.png')
    dataset = open_data(folders).train
    assert len(dataset) == 12
    with pytest.raises(UnreadableImageError, match=f'{path}.*--check-images pixels'):
        [dataset[index] for index in range(12)]
    assert len(open_data(folders, '--check-images', 'pixels').train) == 11
    assert '1 of 12 training images' in caplog.text
    cut(folders / 'train' / 'a' / '3.png')
    assert len(open_data(folders, '--check-images', 'none').train) == 12


def test_what_macos_writes_is_no_image_and_no_fault(folders, caplog):
    caplog.set_level(logging.INFO)
    for split in ('train', 'validation'):
        (folders / split / 'a' / '._0.png').write_bytes(b'\0\5\x16\7' + bytes(100))
    for check in ('files', 'none'):
        datasets = open_data(folders, '--check-images', check)
        assert (len(datasets.train), len(datasets.validation)) == (12, 12)
    assert f'1 hidden file(s) or folder(s) of {folders / "train"} are left out' in caplog.text


def test_a_tar_is_looked_into(tmp_path, caplog):
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        for name in 'ab':
            for index in range(5):
                file = io.BytesIO()
                noise(index + 10 * (name == 'b')).save(file, 'PNG')
                data = file.getvalue()[: 900 if index == 1 else None]
                info = tarfile.TarInfo(f'{name}/{"._" if index == 4 else ""}{index}.png')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    args = parse_args(['--data-dir', str(tmp_path / 'images.tar'), '--val-split='])
    dataset = create_datasets(args.settings.data).train
    assert len(dataset) == 6
    assert f'Left out: {tmp_path}/images.tar/a/1.png' in caplog.text
    expected = [np.array(noise(index + 10 * b)) for b in (0, 1) for index in (0, 2, 3)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=lambda item: item)
    dataset.transform = np.array
    for (image, _), pixels in zip(loader, expected, strict=True):
        assert np.array_equal(image, pixels)


def test_image_folders_of_torchvision_are_looked_into(folders, caplog):
    cut(folders / 'train' / 'a' / '3.png')
    rgba = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(rgba, 'RGBA').save(folders / 'train' / 'a' / '0.png')
    dataset = open_data(folders, '--dataset', 'torch/image_folder').train
    assert len(dataset) == 11
    assert np.array(dataset[0][0]).min() == 255
    assert '1 of 12 training images' in caplog.text


def test_a_split_without_a_readable_image_is_an_error(folders):
    for path in folders.glob('train/*/*.png'):
        path.write_text('')
    with pytest.raises(ValueError, match='all 12 cannot'):
        open_data(folders)


def test_threads_find_what_one_finds(folders, monkeypatch):
    for path in folders.glob('train/*/[135].png'):
        cut(path)
    monkeypatch.setattr(readable, '_PER_TASK', 2)
    files = readable._Files.of(timm.data.ImageDataset(str(folders / 'train')))
    assert sorted(readable._find_faults(files, False, 'training')) == [1, 3, 5, 7, 9, 11]


@pytest.mark.slow
def test_two_processes_share_the_files_and_leave_out_the_same(folders, tmp_path):
    for path in folders.glob('train/*/[125].png'):
        cut(path)
    (first, second) = launch_ranks('readable_worker.py', 2, tmp_path)
    assert first['left'] == second['left'] == [0, 3, 4, 6, 9, 10]
    assert (first['looked_at'], second['looked_at']) == (list(range(0, 12, 2)), list(range(1, 12, 2)))


def test_photos_and_transparent_images_arrive_as_they_are_shown(tmp_path):
    data = write_folders(tmp_path / 'data', {'train/a': 0, 'train/b': 0}, size=8)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0).resize((40, 20)).save(data / 'train' / 'a' / 'x.jpg', exif=exif, quality=95)
    Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(data / 'train' / 'b' / 'x.png')
    for flags in ((), ('--dataset', 'torch/image_folder')):
        dataset = open_data(data, '--val-split=', *flags).train
        assert dataset[0][0].size == (20, 40)
        stored = Image.open(data / 'train' / 'a' / 'x.jpg').convert('RGB')
        assert np.array_equal(np.array(dataset[0][0]), np.rot90(np.array(stored), -1))
        assert dataset[1][0].getpixel((0, 0)) == (255, 255, 255)


def test_a_stream_of_records_arrives_as_it_is_shown(tmp_path):
    datasets = pytest.importorskip('datasets')
    exif = Image.Exif()
    exif[0x0112] = 8
    photo, png = io.BytesIO(), io.BytesIO()
    noise(1).resize((40, 20)).save(photo, 'JPEG', exif=exif)
    Image.new('RGBA', (8, 8), (0, 0, 255, 0)).save(png, 'PNG')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['a', 'b'])})
    table = {'image': [{'bytes': file.getvalue(), 'path': None} for file in (photo, png)], 'label': [0, 1]}
    (tmp_path / 'data').mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / 'data' / 'train.parquet')
    for kind in ('hfds', 'hfids'):
        flags = ['--dataset', f'{kind}/{tmp_path / "data"}', '--val-split=', '-b', '1', '--train-num-samples', '2']
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            dataset = create_datasets(parse_args([*flags, '--data-dir', str(tmp_path / 'cache')]).settings.data).train
            read = dataset if kind == 'hfids' else [dataset[0], dataset[1]]
            samples = sorted(read, key=lambda sample: sample[1])
        assert samples[0][0].size == (20, 40), kind
        assert samples[1][0].getpixel((0, 0)) == (255, 255, 255), kind


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'], ids=['folders', 'torchvision'])
def test_a_pipe_among_the_images_is_left_out_and_not_waited_for(folders, caplog, dataset):
    os.mkfifo(folders / 'train' / 'a' / 'pipe.png')
    (folders / 'train' / 'b' / 'zero.png').symlink_to('/dev/zero')
    data = open_data(folders, '--dataset', dataset)
    assert len(data.train) == 12
    left_out = [record.message for record in caplog.records if record.message.startswith('Left out: ')]
    assert [message.rpartition('/')[2] for message in left_out] == [
        'pipe.png (it is a named pipe)',
        'zero.png (it is a device)',
    ]
    unchecked = open_data(folders, '--dataset', dataset, '--check-images', 'none').train
    with pytest.raises(UnreadableImageError, match=r'pipe\.png.*it is a named pipe'):
        [unchecked[index] for index in range(len(unchecked))]


def too_many_pixels(data):
    return rf'{data}.*it has 1024 pixels.*CORETUNE_MAX_PIXELS=1024 in the environment'


def test_an_image_of_too_many_pixels_is_refused_with_the_way_to_allow_it(folders, monkeypatch, caplog):
    unchecked = [open_data(folders, *flags, '--check-images', 'none').train for flags in ((), TORCHVISION)]
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)  # PIL warns of more, and refuses twice as many
    for dataset in unchecked:
        with pytest.raises(UnreadableImageError, match=too_many_pixels(r'a/0\.png')):
            dataset[0]
    with pytest.raises(ValueError, match='Expected training images that can be read, all 12 cannot'):
        open_data(folders)
    assert any(re.search(too_many_pixels(r'a/0\.png'), record.message) for record in caplog.records)
    Image.MAX_IMAGE_PIXELS = 1024
    assert len(open_data(folders).train) == 12


class Opening(VisionDataset):
    """A data set of torchvision that opens its images itself."""

    def __init__(self, root):
        super().__init__(root)
        self.paths = sorted(root.rglob('*.png'))

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index])), 0


def test_too_many_pixels_are_explained_where_another_library_opens_the_image(folders, monkeypatch):
    stream = ImageStream(SimpleNamespace(root='records'), 'RGB')
    stream.reader = map(lambda path: (Image.open(path), 0), sorted(folders.rglob('*.png')))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    with pytest.raises(UnreadableImageError, match=too_many_pixels(r'\[0\]')):
        ConvertedImages(Opening(folders), 'RGB')[0]
    with pytest.raises(UnreadableImageError, match=too_many_pixels('the stream')):
        next(iter(stream))
