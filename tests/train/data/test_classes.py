"""Classes: known from whatever tells them, the same in both splits and in the model, and no label beyond them"""

import json
import os
import random
import tarfile

import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from runs import results_of, train
from safetensors.torch import load_file, save_file
from timm.data.readers.reader_image_folder import find_images_and_targets
from tiny_data import write_folders, write_images
from torchvision.datasets import ImageFolder

from timm_coretune import export_model
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.class_folders import ReaderClassFolders, TorchvisionClassFolders
from timm_coretune.train.data.classes import ModelClasses, names_by_index, read_class_map, read_model_classes
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.data.labelled import get_labels

TWO_SPLITS = ('train', 'validation')


def open_(root, *flags, **kwargs):
    return create_datasets(parse_args(['--data-dir', str(root), *map(str, flags)]).settings.data, **kwargs)


def splits_of(root, *classes, count=4):
    return write_folders(root, {f'{split}/{name}': count for split in TWO_SPLITS for name in classes})


def write_hub(root, labels, features=None):
    """A data set of Hugging Face with a list of labels for each split, and the flags that name it."""
    (root / 'hub').mkdir()
    for split, values in labels.items():
        pictures = [Image.new('RGB', (8, 8), (index, 0, 0)) for index in range(len(values))]
        kinds = Features({'image': ImageFeature(), 'label': features}) if features else None
        rows = Dataset.from_dict({'image': pictures, 'label': values}, features=kinds)
        rows.to_parquet(root / 'hub' / f'{split}.parquet')
    return root / 'cache', '--dataset', f'hfds/{root / "hub"}'


# folders


def test_ordinary_folders_are_read_as_timm_reads_them(tmp_path):
    draws = random.Random(0)
    for name in ('b10', 'b9', 'A', 'deep/c', 'deep/a b', 'Z'):
        (tmp_path / name).mkdir(parents=True)
        for number in draws.sample(range(1000), 5):
            ending = draws.choice(('png', 'JPG', 'jpeg', 'txt'))
            (tmp_path / name / f'x{number}.{ending}').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'Z')
    samples, class_to_idx = find_images_and_targets(str(tmp_path))
    reader = ReaderClassFolders(str(tmp_path))
    assert (reader.samples, reader.class_to_idx) == (samples, class_to_idx)
    assert reader.filename(0) == os.path.relpath(samples[0][0], tmp_path)


def test_torchvision_reads_ordinary_folders_in_its_own_order(tmp_path):
    write_folders(tmp_path, {'b10': 3, 'b9': 2, 'a': 2, 'a/z': 2, 'a/b': 1})
    Image.new('RGB', (8, 8)).save(tmp_path / 'a' / 'c.png')
    ours, theirs = TorchvisionClassFolders(tmp_path), ImageFolder(str(tmp_path))
    assert (ours.samples, ours.class_to_idx, ours.targets) == (theirs.samples, theirs.class_to_idx, theirs.targets)


def test_torchvision_reads_no_hidden_folders_and_no_loops(tmp_path, messages):
    splits_of(tmp_path, 'ant', 'bee', '.ipynb_checkpoints')
    (tmp_path / 'train' / 'ant' / 'up').symlink_to('..')
    found = open_(tmp_path, '--dataset', 'torch/image_folder')
    assert (len(found.train), found.class_names) == (8, ['ant', 'bee'])
    assert any('leads to a folder that it lies in' in message for message in messages('WARNING'))


@pytest.mark.parametrize('kind', ['folders', 'tar'])
def test_what_is_hidden_or_in_no_class_folder_is_no_image_of_a_class(tmp_path, messages, kind):
    root = write_folders(tmp_path / 'data', {'ant': 4, 'bee': 4, '.ipynb_checkpoints': 2, 'bee/.ipynb_checkpoints': 1})
    (root / 'ant' / '._0.png').write_bytes(b'no image')
    Image.new('RGB', (8, 8)).save(root / 'cover.png')
    if kind == 'tar':
        with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
            tar.add(root, arcname='.')
        root = tmp_path / 'data.tar'
    found = open_(root, '--val-split', '')
    assert found.class_names == ['ant', 'bee']
    assert get_labels(found.train) == [0] * 4 + [1] * 4
    assert [found.train[index][1] for index in range(8)] == get_labels(found.train)
    assert any('hidden file(s) or folder(s)' in message for message in messages())
    assert any('1 image(s) directly in' in message for message in messages('WARNING'))


def test_a_link_that_loops_is_not_followed(tmp_path, messages):
    splits_of(tmp_path, 'ant', 'bee')
    (tmp_path / 'train' / 'ant' / 'up').symlink_to('..')
    (tmp_path / 'train' / 'top').symlink_to(tmp_path)
    (tmp_path / 'train' / 'bee' / 'self').symlink_to('.')
    (tmp_path / 'train' / 'itself').symlink_to('itself')
    found = open_(tmp_path)
    assert (len(found.train), found.class_names) == (8, ['ant', 'bee'])
    assert len([message for message in messages('WARNING') if 'leads to a folder that it lies in' in message]) == 3


def test_classes_that_differ_in_case_have_one_order(tmp_path):
    write_folders(tmp_path, {'b': 1, 'B': 1, 'a': 1, 'A': 1})
    assert ReaderClassFolders(str(tmp_path)).class_to_idx == {'A': 0, 'a': 1, 'B': 2, 'b': 3}


# class maps


def test_a_class_map_has_no_class_without_a_name_and_says_what_it_leaves_out(tmp_path, messages):
    splits_of(tmp_path / 'data', 'ant', 'bee', 'cat')
    (tmp_path / 'map.txt').write_text('cat\n\nant\ndog\n\n')
    found = open_(tmp_path / 'data', '--class-map', tmp_path / 'map.txt')
    assert (found.num_classes, found.class_names) == (3, ['cat', 'ant', 'dog'])
    assert get_labels(found.train) == [1] * 4 + [0] * 4
    warnings = ' '.join(messages('WARNING'))
    assert 'leaves out 4 image(s) of' in warnings
    assert 'does not name: bee' in warnings
    assert 'names classes without images' in warnings
    assert 'has empty lines' in warnings


@pytest.mark.parametrize(
    'text, message',
    [
        ('ant\nbee\nant\n', 'ant more than once'),
        ('\n\n', 'found none'),
        ('cow\n', 'names none of its folders ant, bee'),
    ],
    ids=['twice', 'empty', 'others'],
)
def test_a_class_map_that_cannot_be_used_is_an_error(tmp_path, text, message):
    splits_of(tmp_path / 'data', 'ant', 'bee')
    (tmp_path / 'map.txt').write_text(text)
    with pytest.raises(ValueError, match=message):
        open_(tmp_path / 'data', '--class-map', tmp_path / 'map.txt')


def test_a_class_map_is_not_ignored(tmp_path, images):
    (tmp_path / 'map.txt').write_text('odd\neven\n')
    with pytest.raises(ValueError, match='this data set has its own indices'):
        open_(images, '--class-map', tmp_path / 'map.txt')
    with pytest.raises(ValueError, match='found no such file'):
        open_(tmp_path, '--class-map', 'nowhere.txt')
    assert read_class_map('', '') is None
    assert names_by_index({'b': 0, 'a': 0, 'c': 2}) == ['b / a', '1', 'c']


# labels of records


@pytest.mark.parametrize('names', [None, ['x', 'y', 'z']], ids=['int64', 'named'])
def test_classes_come_from_the_labels_where_nothing_else_tells_them(tmp_path, messages, names):
    feature = ClassLabel(names=names) if names else Value('int64')
    found = open_(*write_hub(tmp_path, {'train': [0, 1, 2, 1], 'validation': [2, 0]}, feature))
    assert (found.num_classes, found.class_names) == (3, names)
    assert get_labels(found.train) == [0, 1, 2, 1]
    assert not messages('WARNING')


def test_strings_are_mapped_alike_in_both_splits(tmp_path, messages):
    found = open_(*write_hub(tmp_path, {'train': ['c10', 'b', 'c9', 'b'], 'validation': ['c9', 'c10']}))
    assert (found.num_classes, found.class_names) == (3, ['b', 'c9', 'c10'])
    assert get_labels(found.train) == [found.train[i][1] for i in range(4)] == [2, 0, 1, 0]
    assert get_labels(found.validation) == [found.validation[i][1] for i in range(2)] == [1, 2]


@pytest.mark.parametrize(
    'labels, message',
    [
        ({'train': [0, 1, 1], 'validation': [0, -1]}, 'from 0 to 1 in the validation images .*1 of 2 are not.*image 1'),
        ({'train': [-1, 1, 1], 'validation': [0, 1]}, 'in the training images .*a split has no labels'),
        ({'train': [0.5, 1.0], 'validation': [0.0, 1.0]}, 'found float'),
        ({'train': [[0], [1]], 'validation': [[0], [1]]}, 'found list'),
    ],
    ids=['unlabelled', 'unlabelled-training', 'floats', 'lists'],
)
def test_labels_that_are_no_classes_are_an_error_before_the_first_step(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        open_(*write_hub(tmp_path, labels))


def test_a_stream_has_its_named_classes_and_no_strings(tmp_path, messages):
    root, *words = write_hub(tmp_path, {'train': ['a', 'b'], 'validation': ['b', 'a']})
    words = [root, '--dataset', words[1].replace('hfds/', 'hfids/')]
    flags = ['--train-num-samples', 2, '--val-num-samples', 2]
    with pytest.raises(ValueError, match='they are strings. Give the classes as --class-map'):
        open_(*words, *flags)
    (tmp_path / 'map.txt').write_text('b\na\n')
    found = open_(*words, *flags, '--class-map', tmp_path / 'map.txt')
    assert (found.num_classes, found.class_names) == (2, ['b', 'a'])
    assert [label for _, label in found.validation] == [0, 1]
    assert any('are not known before they are read' in message for message in messages())
    with pytest.raises(ValueError, match='which has train, validation'):
        open_(*words, *flags, '--val-split', 'tset')
    with pytest.raises(ValueError, match='no images can be held out'):
        open_(*words, *flags, '--val-fraction', 0.1)


def test_labels_beyond_the_named_classes_are_an_error(tmp_path):
    path = write_images(tmp_path / 'a.safetensors', [2, 2, 2], [1, 1, 1], names=['ant', 'bee'])
    with pytest.raises(ValueError, match='Expected labels from 0 to 1 in the training images'):
        open_(path)


def test_labels_with_gaps_and_classes_without_training_images_are_said(tmp_path, messages):
    found = open_(*write_hub(tmp_path, {'train': [0, 10, 0, 10], 'validation': [0, 20]}))
    assert found.num_classes == 21
    assert any('there are 21 classes, of which 3 occur' in message for message in messages('WARNING'))
    assert 'Classes without training images are validated: 20.' in messages('WARNING')


def test_a_run_on_a_tar_file_has_its_classes(tmp_path, messages):
    write_folders(tmp_path / 'data', {'ant': 12, 'bee': 12})
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(tmp_path / 'data', arcname='data')
    folder = train(tmp_path / 'data.tar', tmp_path, '--coretune', '--epochs', 1)
    assert timm.create_model(
        f'local-dir:{folder}', num_classes=2, checkpoint_path=str(folder / 'model_best.safetensors')
    )
    assert json.loads((folder / 'config.json').read_text())['label_names'] == ['ant', 'bee']
    assert 'Training: 22 images of 2 classes, 11 to 11 a class' in messages()


def test_the_default_number_of_classes_of_a_model_is_said_loudly(tmp_path, messages, monkeypatch):
    monkeypatch.setattr('timm_coretune.train.data.datasets.get_labels', lambda dataset: None)
    monkeypatch.setattr('timm_coretune.train.data.datasets.class_to_idx_of', lambda dataset: None)
    train(splits_of(tmp_path / 'data', 'ant', 'bee', count=8), tmp_path, '--epochs', 1)
    assert any('THE NUMBER OF CLASSES IS NOT KNOWN' in message and '1000' in message for message in messages('WARNING'))


def test_labels_of_inaturalist_are_known(tmp_path):
    for version in ('2021_train', '2021_valid'):
        for number, name in enumerate(('Aves_a', 'Mammalia_b')):
            kind = tmp_path / version / f'{number:05d}_Animalia_Chordata_{name}_family_genus_species'
            kind.mkdir(parents=True)
            for image in range(2 - number):
                Image.new('RGB', (8, 8)).save(kind / f'{image}.jpg')
    found = open_(tmp_path, '--dataset', 'torch/inaturalist')
    assert get_labels(found.train) == [0, 0, 1]
    assert [found.train[index][1] for index in range(3)] == [0, 0, 1]
    assert found.num_classes == 2


# the classes of a model


def model_of(names, is_asked_for=True):
    return ModelClasses(names, len(names), 'model_best.safetensors', is_asked_for)


@pytest.mark.parametrize('kind', ['folders', 'hfds', 'strings', 'safetensors'])
def test_the_same_classes_in_another_order_are_numbered_as_in_the_model(tmp_path, kind):
    names = ['ant', 'bee', 'cat']
    if kind == 'folders':
        data = (splits_of(tmp_path, *names, count=1),)
    elif kind == 'safetensors':
        data = (write_images(tmp_path / 'a.safetensors', [1, 1, 1], [1, 1, 1], names=names),)
    else:
        labels = names if kind == 'strings' else [0, 1, 2]
        feature = None if kind == 'strings' else ClassLabel(names=names)
        data = write_hub(tmp_path, {'train': labels, 'validation': labels}, feature)
    for with_training in (True, False):
        found = open_(*data, with_training=with_training, model_classes=model_of(['cat', 'ant', 'bee']))
        assert found.class_names == ['cat', 'ant', 'bee']
        assert get_labels(found.validation) == [found.validation[i][1] for i in range(3)] == [1, 2, 0]


@pytest.mark.parametrize(
    'names, with_training, message',
    [
        (['ant', 'cow'], False, 'cow only in the model; bee only in the data. Rename'),
        (['ant', 'bee', 'cow'], False, 'cow only in the model. Rename'),
        (['ant'], False, 'bee only in the data'),
        (['ant', 'cow'], True, 'bee only in the data. To start from the backbone alone'),
    ],
)
def test_other_classes_than_those_of_the_model_are_an_error_that_names_them(tmp_path, names, with_training, message):
    with pytest.raises(ValueError, match=message):
        open_(splits_of(tmp_path, 'ant', 'bee'), with_training=with_training, model_classes=model_of(names))


def test_a_model_may_learn_other_classes(tmp_path, messages):
    data = splits_of(tmp_path, 'ant', 'bee')
    assert open_(data, model_classes=model_of(['ant', 'bee', 'cow'])).class_names == ['ant', 'bee']
    assert open_(data, model_classes=model_of(['ant', 'cow'], False)).class_names == ['ant', 'bee']
    assert any('The data has other classes than' in message for message in messages('WARNING'))


def test_names_that_are_not_known_are_not_compared(tmp_path, messages):
    found = open_(write_images(tmp_path / 'a.safetensors', [1, 1], [1, 1]), model_classes=model_of(['ant', 'bee']))
    assert get_labels(found.validation) == [0, 1]
    assert any('cannot be compared' in message for message in messages())


def test_records_without_names_have_as_many_classes_as_the_model_that_is_evaluated(tmp_path):
    data = write_hub(tmp_path, {'train': [0, 1, 2], 'validation': [0, 1]})
    model = ModelClasses(None, 3, 'x')
    assert open_(*data, with_training=False, model_classes=model).num_classes == 3
    with pytest.raises(ValueError, match='Expected labels from 0 to 0 in the validation images'):
        open_(*data, with_training=False, model_classes=model._replace(num_classes=1))


def test_a_reordered_folder_scores_as_the_run_did_and_a_renamed_one_is_refused(tmp_path):
    names = ['ant', 'bee', 'cat']
    data = write_images(tmp_path / 'a.safetensors', (8, 8, 8), (4, 4, 4), names=names, noise=60, tint=180)
    (*_, result) = results_of(data, tmp_path, '--epochs', 4)
    best = tmp_path / 'run' / 'model_best.safetensors'
    tensors = load_file(data)
    assert result['validation']['top1'] > 50
    for order, is_same in ((['cat', 'ant', 'bee'], True), (['cat', 'ant', 'cow'], False)):
        # the class of an image stays the same, its number does not
        moved = [names.index(name) if name in names else 1 for name in order]
        place = torch.tensor([moved.index(index) for index in range(3)])
        relabelled = {k: place[v] if k.endswith('label') else v for k, v in tensors.items()}
        save_file(relabelled, tmp_path / 'b.safetensors', metadata={'class_names': json.dumps(order)})
        for source in (['--initial-checkpoint', best], ['--model', f'local-dir:{tmp_path / "run"}', '--pretrained']):
            flags = ['--eval-only', *source]
            if source[0] == '--model':
                (tmp_path / 'run' / 'model.safetensors').write_bytes(best.read_bytes())
            if is_same:
                (again,) = results_of(tmp_path / 'b.safetensors', tmp_path, *flags)
                (plain,) = results_of(data, tmp_path, *flags)
                assert again['validation'] == pytest.approx(plain['validation'])
            else:
                with pytest.raises(ValueError, match='bee only in the model; cow only in the data'):
                    results_of(tmp_path / 'b.safetensors', tmp_path, *flags)


def test_the_classes_of_a_model_are_read_from_its_folder(tmp_path):
    names = ['ant', 'bee', 'cat']
    model = timm.create_model('test_resnet', num_classes=3)
    export_model(model, str(tmp_path / 'tuned'), label_names=names)
    for flags, is_asked_for in (
        (['--pretrained', '--model', f'local-dir:{tmp_path / "tuned"}'], False),
        (['--initial-checkpoint', tmp_path / 'tuned'], True),
        (['--initial-checkpoint', tmp_path / 'tuned' / 'model.safetensors'], True),
    ):
        found = read_model_classes(parse_args([str(flag) for flag in flags]).settings.model)
        assert (found.names, found.num_classes, found.is_asked_for) == (names, 3, is_asked_for)
    for flags in (['--model', 'hf-hub:me/tuned'], ['--pretrained', '--model', 'resnet18'], []):
        assert read_model_classes(parse_args(flags).settings.model) is None


def test_training_from_a_checkpoint_keeps_the_row_of_each_class(tmp_path):
    data = splits_of(tmp_path / 'data', 'ant', 'bee', count=8)
    train(data, tmp_path, '--epochs', 1)
    (tmp_path / 'run').rename(tmp_path / 'first')
    before = load_file(tmp_path / 'first' / 'model_best.safetensors')
    config = json.loads((tmp_path / 'first' / 'config.json').read_text())
    config['label_names'] = ['bee', 'ant']
    (tmp_path / 'first' / 'config.json').write_text(json.dumps(config))
    flags = ('--initial-checkpoint', tmp_path / 'first' / 'model_best.safetensors', '--lr', 1e-30, '--epochs', 1)
    folder = train(data, tmp_path, *flags)
    assert json.loads((folder / 'config.json').read_text())['label_names'] == ['bee', 'ant']
    torch.testing.assert_close(load_file(folder / 'model_best.safetensors')['fc.weight'], before['fc.weight'])
