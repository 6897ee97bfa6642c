"""The loss on the labels is timm's, with the weights that the flags ask for"""

import json
import shlex

import pytest
import torch
from timm.loss import compute_class_weights, create_classification_loss

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.criterion import ClassStats, check_class_stats, create_criterion, read_class_stats

STATS = ClassStats(torch.tensor([6.0, 3.0, 1.0]), 10, 'a test')
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-1.0, 0.0, 4.0]])
TARGET = torch.tensor([0, 2, 1])


def criterion_of(line, stats=STATS, **kwargs):
    settings = parse_args(['--data-dir', '.', *shlex.split(line)]).settings
    data = settings.data
    return create_criterion(settings.loss, data.mixes_pixels, data.aug_splits, stats=stats, num_classes=3, **kwargs)


@pytest.mark.parametrize(
    'line, kwargs',
    [
        ('', dict(loss_type='ce', smoothing=0.1)),
        ('--smoothing 0', dict(loss_type='ce')),
        ('--bce-loss', dict(loss_type='bce', smoothing=0.1)),
        ('--bce-loss --smoothing 0', dict(loss_type='bce')),
        ('--loss bce --bce-sum', dict(loss_type='bce', smoothing=0.1, bce_sum=True)),
        ('--loss bce --bce-target-thresh 0.2', dict(loss_type='bce', smoothing=0.1, bce_target_thresh=0.2)),
        ('--loss bce --bce-pos-weight 2', dict(loss_type='bce', smoothing=0.1, pos_weight=2.0)),
        ('--loss bce --loss-class-weight 1,2,3', dict(loss_type='bce', smoothing=0.1, class_weight=[1.0, 2.0, 3.0])),
        ('--loss asl', dict(loss_type='asl', smoothing=0.1)),
        ('--loss poly --poly-epsilon 1', dict(loss_type='poly', smoothing=0.1, poly_epsilon=1.0)),
    ],
)
def test_flags_are_the_arguments_of_the_factory(line, kwargs):
    expected = create_classification_loss(**kwargs)
    found = criterion_of(line)
    assert type(found) is type(expected)
    assert torch.equal(found(LOGITS, TARGET), expected(LOGITS, TARGET))


@pytest.mark.parametrize(
    'line, kind, kwargs',
    [
        ('--loss-class-weight inv_freq', 'class_weight', dict(method='inv_freq')),
        ('--loss-class-weight effective_num', 'class_weight', dict(method='effective_num')),
        ('--loss-pos-weight neg_pos', 'pos_weight', dict(method='neg_pos')),
        ('--loss-pos-weight neg_pos --loss-weight-power 0.5', 'pos_weight', dict(method='neg_pos', power=0.5)),
    ],
)
def test_weights_by_a_method_come_of_the_counts(line, kind, kwargs):
    weight = compute_class_weights(STATS.counts, STATS.num_samples, **kwargs)[1]
    expected = create_classification_loss('bce', smoothing=0.1, **{kind: weight})
    assert torch.equal(criterion_of(f'--loss bce {line}')(LOGITS, TARGET), expected(LOGITS, TARGET))


def test_distribution_balanced_loss_gets_the_counts():
    settings = parse_args(['--smoothing', '0']).settings.loss
    found = create_criterion(
        type(settings)(loss='db', smoothing=0.0), multi_label=True, stats=STATS, num_classes=3
    )  # fmt: skip
    expected = create_classification_loss('db', multi_label=True, class_counts=STATS.counts, num_samples=10)
    target = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    assert torch.equal(found(LOGITS, target), expected(LOGITS, target))


@pytest.mark.parametrize(
    'line, message',
    [
        ('--loss asl --mixup 0.2', 'does not support Mixup/CutMix'),
        ('--loss zlpr', 'requires multi-label targets'),
        ('--coretune --loss zlpr', 'requires multi-label targets'),
        ('--coretune --loss poly --poly-gamma 1', 'Poly gamma and alpha only apply to the multi-label'),
        ('--coretune --loss poly --loss-class-weight 1,2', 'only supported by bce and multi-label asl'),
        ('--loss-class-weight 2', 'only supported by bce and multi-label asl'),
        ('--loss bce --loss-class-weight missing.json', '--loss-class-weight: expected numbers with commas'),
        ('--loss bce --loss-pos-weight inv_freq', "ValueError: Method 'inv_freq' computes class_weight"),
        ('--loss bce --loss-class-weight inv_freq --class-stats missing.json', 'missing.json'),
        ('--bce-sum', 'only apply to the bce loss'),
    ],
)
def test_what_the_factory_refuses_is_refused_before_anything_is_opened(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(['--data-dir', 'nowhere', *shlex.split(line)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count('\n') == 1


def test_a_weight_for_each_class_is_asked_for():
    with pytest.raises(ValueError, match='--loss-class-weight: expected a weight for each of the 3 classes, .* got 2'):
        criterion_of('--loss bce --loss-class-weight 1,2')


def test_a_file_of_counts_is_read_with_its_names(tmp_path):
    path = tmp_path / 'stats.json'
    path.write_text(json.dumps(dict(pos_counts=[2, 1], num_samples=3, class_names=['ant', 'bee'])))
    stats = read_class_stats(str(path))
    assert (stats.counts.tolist(), stats.num_samples, stats.names) == ([2, 1], 3, ['ant', 'bee'])
    check_class_stats(stats, 2, ['ant', 'bee'])
    check_class_stats(stats, 2, None)
    with pytest.raises(ValueError, match="its class 1 is 'bee' and that of the data 'wasp'"):
        check_class_stats(stats, 2, ['ant', 'wasp'])
    with pytest.raises(ValueError, match='Expected counts of the 3 classes of the model in .*stats.json, got 2'):
        check_class_stats(stats, 3, None)
    path.write_text('{}')
    with pytest.raises(ValueError, match="needs 'pos_counts' and 'num_samples' entries"):
        read_class_stats(str(path))
