"""Runs of train.py on images with several labels: scores against scikit-learn, readers, bad input, resume"""

import json
import os

import numpy as np
import pytest
import torch
from make_attributes import ATTRIBUTES, make_attributes
from PIL import Image
from runs import ON_CPU, outcome, results_of, rows_of, stop_at, train
from safetensors.torch import load_file, save_file

from timm_coretune.data.safetensors_images import read_split
from timm_coretune.run_folder import read_json

SEVERAL = ('--task', 'multilabel')
NAMES = ['red', 'green', 'blue']


@pytest.fixture(scope='module')
def attributes(tmp_path_factory):
    """Real images of clothes with attributes: a part of the sample."""
    path = tmp_path_factory.mktemp('attributes') / 'attributes.safetensors'
    make_attributes(str(path))
    splits = {name: read_split(str(path), name) for name in ('train', 'validation')}
    tensors = {}
    for name, split in splits.items():
        rows = torch.randperm(len(split.label), generator=torch.Generator().manual_seed(0))[:160]
        tensors[f'{name}.image'], tensors[f'{name}.label'] = split.image[rows], split.label[rows]
    save_file(tensors, path, {'class_names': json.dumps(list(ATTRIBUTES))})
    return path


def write_file(path, label, **kwargs):
    images = torch.randint(256, (len(label), 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    others = torch.randint(256, (len(label), 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensors = {'train.image': images, 'train.label': label, 'validation.image': others}
    save_file({**tensors, 'validation.label': label.clone()}, path, **kwargs)
    return path


@pytest.mark.parametrize('method', [('--coretune',), ('--method', 'scl'), ()], ids=['core', 'scl', 'plain'])
def test_scores_are_those_of_scikit_learn_on_the_saved_predictions(attributes, tmp_path, method):
    metrics = pytest.importorskip('sklearn.metrics')
    flags = (*SEVERAL, '-b', '16', '--metrics', 'per-class,predictions', '--multilabel-threshold', '0.4', *method)
    folder = train(attributes, tmp_path, *flags)
    saved = load_file(folder / 'predictions.safetensors')
    best = max(rows_of(folder / 'summary.csv'), key=lambda row: float(row['eval_map']))
    target, probability = saved['target'].numpy(), saved['logits'].double().sigmoid().numpy()
    assert np.array_equal(target, read_split(str(attributes), 'validation').label.numpy())
    predicted = probability >= 0.4
    assert predicted.any()
    expected = {'map': metrics.average_precision_score(target, probability, average='macro')}
    for name, average in (('micro_f1', 'micro'), ('macro_f1', 'macro'), ('sample_f1', 'samples')):
        expected[name] = metrics.f1_score(target, predicted, average=average, zero_division=0)
    expected['loss'] = metrics.log_loss(target.ravel(), probability.ravel()) / 100
    for name, value in expected.items():
        assert float(best[f'eval_{name}']) == pytest.approx(100 * value, rel=1e-6), name
    table = rows_of(folder / 'per_class.csv')
    assert [row['class'] for row in table] == list(ATTRIBUTES)
    for index, row in enumerate(table):
        assert float(row['ap']) == pytest.approx(
            100 * metrics.average_precision_score(target[:, index], probability[:, index])
        )
        assert int(row['support']) == target[:, index].sum()
        if row['f1']:
            f1 = metrics.f1_score(target[:, index], predicted[:, index], zero_division=0)
            assert float(row['f1']) == pytest.approx(100 * f1)
    config = read_json(folder / 'config.json')
    assert (config['num_classes'], config['label_names']) == (len(ATTRIBUTES), list(ATTRIBUTES))


def test_a_stopped_run_goes_on_bit_by_bit(attributes, tmp_path, monkeypatch):
    flags = (*SEVERAL, '--coretune', '-b', '16', '--mixup', '0.2')
    expected = outcome(train(attributes, tmp_path / 'whole', *flags))
    with monkeypatch.context() as patched:
        stop_at(patched, 'train_one_epoch', 1)
        train(attributes, tmp_path / 'stopped', *flags)
    assert outcome(train(attributes, tmp_path / 'stopped', *flags, '--resume', 'auto')) == expected


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    """A folder that datasets loads: images with lists of class indices, multi-hot rows, and a field for each class."""
    datasets = pytest.importorskip('datasets')
    folder = tmp_path_factory.mktemp('records')
    labels = [[0], [0, 1], [2], [], [1, 2], [0, 1, 2], [1], [0, 2]] * 2
    for split, seed in (('train', 0), ('validation', 1)):
        random = np.random.default_rng(seed)
        images = [Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)) for _ in labels]
        columns = {
            'image': images,
            'labels': labels,
            'row': [[float(c in some) for c in range(3)] for some in labels],
            **{name: [int(c in some) for some in labels] for c, name in enumerate(NAMES)},
        }
        features = datasets.Features(
            {
                'image': datasets.Image(),
                'labels': datasets.Sequence(datasets.ClassLabel(names=NAMES)),
                'row': datasets.Sequence(datasets.Value('float32')),
                **{name: datasets.Value('int64') for name in NAMES},
            }
        )
        (folder / 'data').mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / 'data' / f'{split}-0.parquet')
    return folder


def test_all_forms_of_labels_train_to_the_same_weights(records, tmp_path):
    forms = {
        'list': ('--target-key', 'labels'),
        'row': ('--target-key', 'row', '--target-format', 'multihot'),
        'fields': ('--target-key', ','.join(NAMES)),
    }
    found = {}
    for name, flags in forms.items():
        cache = ('--data-dir', tmp_path / 'cache', '--dataset', f'hfds/{records}')
        found[name] = train(None, tmp_path / name, *SEVERAL, '--coretune', *cache, *flags)
    assert outcome(found['list']) == outcome(found['row']) == outcome(found['fields'])
    assert read_json(found['fields'] / 'config.json')['label_names'] == NAMES
    assert read_json(found['list'] / 'config.json')['label_names'] == NAMES


@pytest.mark.parametrize('key', ['red,pink', 'pink'])
def test_a_field_that_is_not_there_is_named_with_those_that_are(records, tmp_path, key):
    flags = ('--data-dir', tmp_path / 'cache', '--dataset', f'hfds/{records}', '--target-key', key)
    with pytest.raises(ValueError, match='pink.*(blue.*green.*image.*labels.*red)'):
        results_of(None, tmp_path, *SEVERAL, *flags)


@pytest.mark.parametrize(
    'label, flags, message',
    [
        (torch.tensor([[0.0, 2.0]] * 9), (), r'Image 0 of the training images.*\[0.0, 2.0\].*in \[0, 1\]'),
        (torch.zeros(9, 2), ('--num-classes', '3'), None),
        (torch.zeros(9, dtype=torch.int64), (), 'Expected a list of labels for each image.*got 0'),
    ],
)
def test_bad_labels_are_refused(tmp_path, label, flags, message):
    path = write_file(tmp_path / 'bad.safetensors', label)
    if message is None:  # names of the data count, which has two classes
        assert results_of(path, tmp_path, *SEVERAL)
        return
    with pytest.raises(ValueError, match=message):
        results_of(path, tmp_path, *SEVERAL, *flags)


def test_images_without_labels_are_counted_once_and_trained(tmp_path, caplog):
    label = torch.eye(3).repeat(8, 1)
    label[:5] = 0
    path = write_file(tmp_path / 'some.safetensors', label, metadata={'class_names': json.dumps(NAMES)})
    result = results_of(path, tmp_path, *SEVERAL, '--coretune')
    said = [record.getMessage() for record in caplog.records if 'no label at all' in record.getMessage()]
    assert len(said) == 2  # of each split once
    assert said[0].startswith('0.79 labels an image in the training images')
    assert '5 of 24 have no label at all' in said[0]
    assert all(np.isfinite(value) for value in result[-1]['train'].values())


def test_a_part_is_held_out_and_a_part_is_used(tmp_path):
    label = (torch.rand(60, 4, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    images = torch.randint(256, (60, 16, 16), dtype=torch.uint8)
    path = tmp_path / 'whole.safetensors'
    save_file({'train.image': images, 'train.label': label}, path)
    flags = ('--task', 'multilabel', '--label-fraction', '0.5', '--metrics', 'predictions')
    folder = train(path, tmp_path, *flags)
    assert len(load_file(folder / 'predictions.safetensors')['target']) == 6


def test_folders_of_classes_have_one_label_an_image(tmp_path):
    os.makedirs(tmp_path / 'data' / 'train' / 'a')
    with pytest.raises(ValueError, match='each has one, its class'):
        results_of(tmp_path / 'data', tmp_path, '--task', 'multilabel', base=ON_CPU)


@pytest.mark.parametrize(
    'flags',
    [
        ('--loss', 'asl', '--coretune'),
        ('--loss', 'poly', '--poly-gamma', '2', '--coretune'),
        ('--loss', 'db', '--coretune'),
        ('--loss', 'zlpr'),
        ('--loss', 'twoway', '--method', 'scl'),
    ],
    ids=' '.join,
)
def test_every_loss_of_timm_for_several_labels_trains(attributes, tmp_path, flags):
    (result,) = results_of(attributes, tmp_path, *SEVERAL, '-b', '16', '--epochs', '1', *flags)
    assert np.isfinite(result['train']['loss'])
    assert result['validation']['map'] > 10


@pytest.mark.parametrize('method', [('--coretune',), ()], ids=['core', 'plain'])
def test_weights_of_classes_are_counted_over_label_sets(attributes, tmp_path, method):
    label = read_split(str(attributes), 'train').label
    counts = label.sum(0).double()
    given = ','.join(str(float(w)) for w in ((len(label) - counts) / counts))
    flags = (*SEVERAL, '-b', '16', '--epochs', '1', *method, '--loss-pos-weight')
    runs = [train(attributes, tmp_path / word[:3], *flags, word) for word in ('neg_pos', given)]
    losses = [float(rows_of(folder / 'summary.csv')[0]['train_loss']) for folder in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
