"""The card of a model, and where a tuned model goes beside the Hub"""

import json
import logging

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from timm_coretune import export_model
from timm_coretune.export import create_config
from timm_coretune.hub.card import CardFacts, create_card

pytestmark = pytest.mark.usefixtures('one_thread')


def test_a_card_tells_only_what_is_known(model, tmp_path):
    export_model(model, str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    card = create_card('me/my-model', config, CardFacts())
    assert card.data.license is None
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert 'Figures' not in card.text
    assert 'not stated' in card.text
    facts = CardFacts(dataset='owner/data', base_model='timm/resnet50.a1_in1k', license='mit', metrics={'top1': 91.25})
    card = create_card('me/my-model', config, facts)
    assert (card.data.base_model, card.data.datasets) == ('timm/resnet50.a1_in1k', ['owner/data'])
    assert card.data.eval_results[0].metric_value == 91.25


def test_a_card_names_the_classes_and_of_many_the_first(model):
    config = create_config(model, label_names=['ant', 'bee `1`', 'two\nlines'])
    assert "- Classes: `ant`, `bee '1'`, `two lines`\n" in create_card('me/my-model', config, CardFacts()).text
    many = {**config, 'label_names': [f'class {index}' for index in range(1000)]}
    text = create_card('me/my-model', many, CardFacts()).text
    assert '`class 29` and 970 more, all in the config\n' in text
    assert 'class 30' not in text
    assert 'Classes' not in create_card('me/my-model', create_config(model), CardFacts()).text


FIGURES = [
    *[np.float64(91.25), np.float32(91.25), np.array(91.25), np.array([91.25]), torch.tensor(91.25), 91.25],
    *[torch.tensor([[91.25]], dtype=torch.float64), torch.tensor(91.25, requires_grad=True)],
]
NO_FIGURES = [float('nan'), np.float32('inf'), torch.tensor(-float('inf')), None, 'high', np.zeros(2), [1, 2]]


@pytest.mark.parametrize('figure', [*FIGURES, *NO_FIGURES], ids=repr)
def test_figures_of_any_kind_are_plain_numbers_of_the_card_or_left_out(model, tmp_path, messages, figure):
    config = create_config(model)
    facts = CardFacts(
        dataset='owner/data',
        metrics={'top1': figure, 'loss': 0.5},
        last_metrics={'top1': figure, 'loss': np.float64(0.75)},
        recipe={'lr': np.float32(0.5), 'coretune': np.bool_(True), 'clip_grad': torch.tensor(0.0)},
    )
    text = str(create_card('me/my-model', config, facts))
    front = yaml.safe_load(text.split('---')[1])  # refuses objects of Python
    results = {metric['type']: metric['value'] for metric in front['model-index'][0]['results'][0]['metrics']}
    is_number = any(figure is each for each in FIGURES)
    assert results == ({'accuracy': 91.25, 'loss': 0.5} if is_number else {'loss': 0.5})
    assert ('| Top-1 accuracy (%) | 91.25 | 91.25 |' in text) == is_number
    assert '| Cross-entropy (nats) | 0.5 | 0.75 |' in text
    assert '| `--lr` | 0.5 |' in text
    assert 'clip-grad' not in text
    assert 'nan' not in text
    assert len(messages('WARNING')) == (0 if is_number else 2)
    assert all('The card leaves out top1' in warning for warning in messages('WARNING'))
    assert ModelCard(text).data.tags


@pytest.mark.parametrize(
    'recipe, how, shown, hidden',
    [
        ({'coretune': True}, 'Core-tuned', ['--coretune', '--coretune-alpha', '--contrast-weight'], ['--method']),
        ({'method': 'core'}, 'Core-tuned', ['--coretune', '--coretune-alpha', '--contrast-weight'], ['--method']),
        ({'method': 'scl'}, 'Fine-tuned with scl', ['--method', '--contrast-weight'], ['--coretune-alpha']),
        (
            {'method': 'l2-sp', 'method_kwargs': {'weight': 0.5}},
            *('Fine-tuned with l2-sp', ['--method', '--method-kwargs'], ['--contrast-weight', '--coretune-alpha']),
        ),
        ({'method': 'plain'}, 'Fine-tuned with cross-entropy', ['--lr'], ['--method', '--contrast-weight']),
        ({}, 'Fine-tuned with cross-entropy', ['--lr'], ['--method', '--contrast-weight']),
    ],
)
def test_a_card_names_the_method_and_only_what_has_an_effect_in_it(model, recipe, how, shown, hidden):
    recipe = {'lr': 0.1, 'contrast_weight': 0.1, 'coretune_alpha': 1.0, **recipe}
    text = create_card('me/my-model', create_config(model), CardFacts(recipe=recipe)).text
    assert f'. {how} with [timm_coretune](https://github.com/' in text
    assert all(f'| `{flag}` |' in text for flag in shown)
    assert not any(f'| `{flag}` |' in text for flag in hidden)


@pytest.mark.parametrize(
    'channels, mode', [(1, ".convert('L')"), (3, ".convert('RGB')"), (4, ".convert('RGBA')"), (5, '')]
)
def test_a_model_of_any_number_of_channels_is_described(tmp_path, channels, mode):
    model = timm.create_model('test_resnet', num_classes=3, in_chans=channels)
    export_model(model, str(tmp_path), {'mean': np.array([0.2, 0.3, 0.4]), 'std': torch.tensor([0.5]), 'crop_pct': 1})
    config = json.loads((tmp_path / 'config.json').read_text())
    described = config['pretrained_cfg']
    mean = pytest.approx([0.2, 0.3, 0.4] if channels == 3 else [0.3] * channels)
    assert (described['mean'], described['std']) == (mean, [0.5] * channels)
    assert described['input_size'][0] == channels
    assert f"Image.open('image.png')){mode}\n" in create_card('me/my-model', config, CardFacts()).text
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded(torch.zeros(1, channels, 32, 32)).shape == (1, 3)
    create_config(model)  # also by the preprocessing of the model that it was made from


@pytest.mark.parametrize('format', ['torch.export', 'onnx'])
def test_a_tuned_model_goes_where_timm_models_go(run_folder, tmp_path, format):
    weights = str(run_folder / 'model_best.safetensors')
    model = timm.create_model('test_resnet', num_classes=10, checkpoint_path=weights).eval()
    image = torch.randn(2, 3, 32, 32)
    if format == 'onnx':
        pytest.importorskip('onnxscript')
        reference = pytest.importorskip('onnx.reference')
        logging.getLogger('onnxscript').setLevel(logging.ERROR)
        torch.onnx.export(model, (image,), str(tmp_path / 'model.onnx'), dynamo=True, input_names=['image'])
        (output,) = reference.ReferenceEvaluator(str(tmp_path / 'model.onnx')).run(None, {'image': image.numpy()})
        output = torch.from_numpy(output)
    else:
        torch.export.save(torch.export.export(model, (image,)), tmp_path / 'model.pt2')
        output = torch.export.load(tmp_path / 'model.pt2').module()(image)
    torch.testing.assert_close(output, model(image), rtol=1e-4, atol=1e-4)
