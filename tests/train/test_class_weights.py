"""train.py with weights of classes: counted in the training split, and the same as weights that are given"""

import json
from functools import partial

import pytest
import runs
from runs import ON_CPU, outcome

FLAGS = (*ON_CPU, '-b', '4', '--epochs', '1', '--eval-metric', 'loss')
train = partial(runs.train, base=FLAGS)


@pytest.fixture(scope='module')
def data(tiny_images):
    """12 training images, of which half are of one class."""
    return tiny_images((6, 4, 2), (2, 2, 2), names=['red', 'green', 'blue'], noise=120, tint=60)


@pytest.mark.parametrize(
    'loss', [['--loss', 'bce'], ['--coretune'], ['--coretune', '--loss', 'bce'], ['--method', 'scl']], ids=' '.join
)
def test_counted_weights_are_those_that_can_be_given(tmp_path, data, messages, loss):
    counted = train(data, tmp_path / 'counted', *loss, '--loss-class-weight', 'inv_freq')
    assert 'Class counts from the training split: 12 images, 2 to 6 a class.' in messages()
    stats = tmp_path / 'stats.json'
    stats.write_text(json.dumps(dict(pos_counts=[6, 4, 2], num_samples=12, class_names=['red', 'green', 'blue'])))
    read = train(data, tmp_path / 'read', *loss, '--loss-class-weight', 'inv_freq', '--class-stats', stats)
    weights = [12 / 6, 12 / 4, 12 / 2]
    mean = sum(weights) / 3
    given = train(data, tmp_path / 'given', *loss, '--loss-class-weight', ','.join(str(w / mean) for w in weights))
    plain = train(data, tmp_path / 'plain', *loss)
    assert outcome(counted) == outcome(read)
    row, of_given, of_plain = (runs.rows_of(run / 'summary.csv')[0] for run in (counted, given, plain))
    assert float(of_given['train_loss']) == pytest.approx(float(row['train_loss']), rel=1e-6)
    assert float(of_plain['train_loss']) != pytest.approx(float(row['train_loss']), rel=1e-4)


def test_loss_coretune_is_coretune(tmp_path, data):
    assert outcome(train(data, tmp_path / 'a', '--loss', 'coretune')) == outcome(
        train(data, tmp_path / 'b', '--coretune')
    )


@pytest.mark.parametrize('names', [['blue', 'green', 'red'], ['red', 'green']], ids=len)
def test_counts_of_other_classes_are_refused(tmp_path, data, names):
    stats = tmp_path / 'stats.json'
    stats.write_text(json.dumps(dict(pos_counts=[2] * len(names), num_samples=12, class_names=names)))
    with pytest.raises(ValueError, match='Expected counts of the '):
        train(data, tmp_path, '--coretune', '--loss-class-weight', 'inv_freq', '--class-stats', stats)
