"""Features that are measured while a model is trained: against plain timm and scikit-learn, and what they leave"""

import re

import numpy as np
import pytest
import timm
import torch
from runs import outcome, stop_at, train
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from timm_coretune.train.data import loaders

NAMES = ['knn_top1', 'rank_me', 'within_class', 'between_class']
WATCH = ('--watch-features', 1, '--crop-pct', 1)


def features_of(model, path, split):
    """Features of plain timm's evaluation of a data set of images of 32 pixels, and the labels."""
    stored = load_file(path)
    images = stored[f'{split}.image'].permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    with torch.no_grad():
        found = model.eval().forward_head(model.forward_features((images - mean) / std), pre_logits=True)
    return found.double().numpy(), stored[f'{split}.label'].numpy()


def figures_of(model, path):
    (queries, labels), (bank, voters) = (features_of(model, path, split) for split in ('validation', 'train'))
    knn = KNeighborsClassifier(20, metric='cosine', weights=lambda distance: np.exp(-distance / 0.07))
    share = np.linalg.svd(queries, compute_uv=False)
    share = share / share.sum()
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    means = {c: unit[labels == c].mean(axis=0) for c in set(labels)}
    return [
        100 * knn.fit(bank, voters).score(queries, labels),
        np.exp(-np.sum(share * np.log(share))),
        np.mean([np.sum((z - means[c]) ** 2) for z, c in zip(unit, labels, strict=True)]),
        np.mean([np.sum((means[c] - means[d]) ** 2) for c in means for d in means if c < d]),
    ]


def measured(row):
    return [float(row[f'features_{name}']) for name in NAMES]


@pytest.fixture
def noisy(tiny_images):
    """24 training and 24 validation images of 32 pixels and 3 classes that are hard to tell apart."""
    return tiny_images((8, 8, 8), (8, 8, 8), size=32, tint=20, noise=230)


def test_figures_are_those_of_plain_timm_and_scikit_learn_before_and_after(noisy, tmp_path, read_csv, messages):
    start = timm.create_model('test_resnet', num_classes=3)
    save_file(start.state_dict(), tmp_path / 'start.safetensors')
    flags = [*WATCH, '--initial-checkpoint', tmp_path / 'start.safetensors', '--epochs', 1, '--coretune']
    folder = train(noisy, tmp_path, *flags)
    rows = read_csv(folder / 'summary.csv')
    assert [row['epoch'] for row in rows] == ['-1', '0']
    assert {name for name, value in rows[0].items() if value} == {'epoch', *(f'features_{name}' for name in NAMES)}
    tuned = timm.create_model(f'local-dir:{folder}', pretrained=True)
    for row, model in zip(rows, (start, tuned), strict=True):
        assert measured(row) == pytest.approx(figures_of(model, noisy), rel=1e-4)
    assert measured(rows[0]) != pytest.approx(measured(rows[1]), rel=0.01)
    (line,) = [message for message in messages() if message.startswith('Features (epoch 0)')]
    shown = [float(value) for value in re.findall(r'\d+\.\d+', line)][:4]
    assert shown == pytest.approx(measured(rows[1]), abs=0.01)


@pytest.mark.slow
def test_training_stays_as_it_is_and_a_stopped_run_goes_on_to_the_same_bytes(tiny, tmp_path, monkeypatch, read_csv):
    flags = ['--coretune', '--recovery-interval', 1, '--watch-features', 2, '--epochs', 3]
    watched = train(tiny, tmp_path / 'watched', *flags)
    plain = train(tiny, tmp_path / 'plain', *flags, '--watch-features', 0)
    rows = read_csv(watched / 'summary.csv')
    assert [bool(row['features_rank_me']) for row in rows] == [True, False, True, True]
    without = [{name: value for name, value in row.items() if 'features' not in name} for row in rows[1:]]
    assert without == read_csv(plain / 'summary.csv')
    assert outcome(watched)['model_best.safetensors'] == outcome(plain)['model_best.safetensors']
    for name, count in (('_step', 2), ('measure_features', 1)):  # in the first epoch, and before the second is saved
        with monkeypatch.context() as context:
            stop_at(context, name, count)
            train(tiny, tmp_path / name, *flags)
        again = train(tiny, tmp_path / name, *flags, '--resume', 'auto')
        assert outcome(again) == outcome(watched)


def test_a_bounded_share_is_measured_the_same_for_every_seed(tiny, tmp_path, monkeypatch, read_csv, messages):
    monkeypatch.setattr(loaders, 'NUM_WATCHED', 11)
    flags = [*WATCH, '--epochs', 1, '--lr', 0, '--initial-checkpoint', tmp_path / 'start.safetensors']
    save_file(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'start.safetensors')
    first, second = (train(tiny, tmp_path / str(seed), *flags, '--seed', seed) for seed in (1, 2))
    assert 'Features are measured of 11 of the 24 training images.' in messages()
    assert 'Features are measured of 11 of the 12 validation images.' in messages()
    starts = [measured(read_csv(folder / 'summary.csv')[0]) for folder in (first, second)]
    assert starts[0] == starts[1]


def test_the_moving_average_is_measured_where_its_score_counts(tiny_images, tmp_path, read_csv):
    data = tiny_images((8, 8, 8), (4, 4, 4), size=32, noise=60, tint=180)
    flags = [*WATCH, '--model-ema', '--eval-metric', 'loss', '--lr', 0.01, '--weight-decay', 0]
    for publish in ('better', 'ema'):  # the average of 6 updates is worse
        folder = train(data, tmp_path / publish, *flags, '--model-ema-publish', publish)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert measured(read_csv(folder / 'summary.csv')[-1]) == pytest.approx(figures_of(model, data), rel=1e-4)
    weights = [outcome(tmp_path / publish / 'run')['model_best.safetensors'] for publish in ('better', 'ema')]
    assert weights[0] != weights[1]


def test_a_stream_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    factory = object.__new__(loaders.LoaderFactory)
    with pytest.raises(ValueError, match='for --watch-features.*got a stream'):
        factory._create_watched(Stream(), 'training')
