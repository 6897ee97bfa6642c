"""The name of a model is checked before anything is opened, and training from random weights is said"""

import pytest
import timm
from runs import results_of

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.weights import (
    check_model_name,
    is_self_supervised,
    nearest_models,
    warn_of_random_weights,
    weights_of,
)


@pytest.mark.parametrize(
    'name, nearest',
    [
        ('resnet5', 'resnet50'),
        ('resnet-50', 'resnet50'),
        ('ResNet50', 'resnet50'),
        ('vit_smal_patch16_224', 'vit_small_patch16_224'),
        ('vit_small', 'vit_small_patch16_224'),
        ('dinov2_vits14', 'vit_small_patch14_dinov2'),
        ('convnext-tiny', 'convnext_tiny'),
    ],
)
def test_a_model_that_is_none_gets_the_nearest_names(name, nearest):
    with pytest.raises(ValueError, match=f'^--model: timm has no model {name!r}. Nearest: .*{nearest}') as error:
        check_model_name(name)
    assert '\n' not in str(error.value)
    assert all(map(timm.is_model, nearest_models(name)))


@pytest.mark.parametrize(
    'name, pretrained, message',
    [
        ('qqqq', False, "--model: timm has no model 'qqqq'. timm.list_models"),
        ('resnet18.nobody', False, "--model: timm has no weights 'nobody' of resnet18, but resnet18.a1_in1k, "),
        ('botnet50ts_256', True, '--pretrained: timm has no weights of botnet50ts_256. Give a checkpoint as'),
        ('timm/resnet18.a1_in1k', False, "--model: .*'hf-hub:timm/resnet18.a1_in1k'"),
        ('nowhere:x', False, "--model: Unknown model source 'nowhere'"),
    ],
)
def test_what_timm_does_not_have_is_said_with_what_it_has(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        check_model_name(name, pretrained)


@pytest.mark.parametrize('name', ['resnet18', 'resnet18.a1_in1k', 'hf-hub:owner/name', 'local-dir:/a/b', 'test_vit'])
def test_what_timm_has_passes(name):
    check_model_name(name, pretrained=True)


def test_a_wrong_name_ends_a_run_before_the_data_is_opened(tmp_path):
    with pytest.raises(ValueError, match='--model: timm has no model'):
        results_of(tmp_path / 'nowhere', tmp_path, '--model', 'resnet5')
    with pytest.raises(ValueError, match='--kd-model-name: timm has no model'):
        results_of(tmp_path / 'nowhere', tmp_path, '--kd-model-name', 'resnet5')


def test_weights_without_labels_are_told_from_those_with_labels():
    with_labels = ('resnet50.a1_in1k', 'vit_base_patch16_clip_224.openai_ft_in1k', 'convnextv2_nano.fcmae_ft_in1k')
    with_labels += (
        'regnety_320.swag_ft_in1k',
        'vit_small_patch16_224.augreg_in21k',
        'vit_tiny_patch16_224.augreg_in1k',
    )
    without = ('vit_small_patch16_224.dino', 'vit_base_patch16_224.mae', 'convnextv2_nano.fcmae', 'regnety_320.seer')
    without += ('vit_small_patch14_dinov2.lvd142m', 'vit_base_patch16_clip_224.openai', 'resnet50_clip.openai')
    without += ('convnext_tiny.dinov3_lvd1689m', 'vit_base_patch16_siglip_224.webli', 'xcit_small_12_p8_224.fb_dino')
    known = {name for name in (*with_labels, *without) if name in timm.list_pretrained()}
    assert len(known) > 12
    assert [name for name in with_labels if is_self_supervised(name)] == []
    assert [name for name in without if not is_self_supervised(name)] == []


def warnings_of(messages, *words, resumed=None):
    before = len(messages('WARNING'))
    warn_of_random_weights(parse_args(['--data-dir', '.', *words]).settings, resumed)
    return messages('WARNING')[before:]


@pytest.mark.parametrize(
    'name', ['vit_small_patch16_224', 'vit_small_patch16_224.augreg_in1k', 'resnet10t', 'test_vit']
)
def test_random_weights_are_said_with_those_that_timm_has(messages, name):
    (warning,) = warnings_of(messages, '--model', name, '--coretune')
    assert warning.startswith('TRAINING STARTS FROM RANDOM WEIGHTS, and Core-tuning is made for weights')
    assert all(flag in warning for flag in ('--pretrained-path FILE', '--pretrained ', '--initial-checkpoint FILE'))
    architecture = name.partition('.')[0]
    for weights in timm.list_pretrained(f'{architecture}.*'):
        assert not is_self_supervised(weights) or weights in warning
    assert weights_of(architecture)[0].partition('.')[0] == architecture
    assert ('vit_small_patch16_224.dino' in warning) == (architecture == 'vit_small_patch16_224')


@pytest.mark.parametrize(
    'words',
    [
        ['--pretrained'],
        ['--pretrained-path', 'moco.pth'],
        ['--initial-checkpoint', 'a.pth'],
        ['--model-kwargs', 'checkpoint_path=a.pth'],
    ],
    ids=' '.join,
)
def test_nothing_is_said_of_weights_that_are_loaded(messages, words):
    assert warnings_of(messages, '--model', 'resnet18', *words) == []


def test_nothing_is_said_of_a_run_that_goes_on(messages):
    assert warnings_of(messages, '--model', 'resnet18', resumed='last.pth.tar') == []
    (warning,) = warnings_of(messages, '--model', 'resnet18', '--eval-only')
    assert warning.startswith('RANDOM WEIGHTS ARE VALIDATED: ')


def test_a_run_says_it_once_and_the_sample_has_its_checkpoint(tmp_path, data, messages):
    results_of(data, tmp_path, '--epochs', 1, '--coretune')
    assert sum('FROM RANDOM WEIGHTS' in message for message in messages('WARNING')) == 1
    warn_of_random_weights(parse_args([]).settings, None)
    assert sum('RANDOM WEIGHTS' in message for message in messages('WARNING')) == 1
