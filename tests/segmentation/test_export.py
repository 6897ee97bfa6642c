"""Files of a segmentation model"""

import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from segmentation_models import create, tuned

from timm_coretune.segmentation import export_segmentation_model, load_segmentation_model

hooks = []  # called with the audit events of Python, of which a hook cannot be removed
sys.addaudithook(lambda event, args: [hook(event, args) for hook in hooks])

DATA_CONFIG = {'mean': (0.5, 0.5, 0.5), 'std': (0.2, 0.2, 0.2), 'interpolation': 'bilinear'}

LOAD = """
import sys, torch
from timm_coretune.segmentation import load_segmentation_model
folder, images, output = sys.argv[1:]
model = load_segmentation_model(folder)
assert not model.training
with torch.inference_mode():
    torch.save(model(torch.load(images)), output)
"""


def test_an_exported_model_gives_the_same_bits_in_another_process(tmp_path, launch):
    images = torch.randn(2, 3, 80, 48)
    torch.save(images, tmp_path / 'images.pt')
    models = {
        'deeplabv3': tuned('test_resnet', output_stride=8),
        'fpn': tuned('test_convnext'),
        'vit': tuned('test_vit', img_size=(80, 48)),
        'linear': tuned('test_vit', 'linear', img_size=(80, 48)),
        'eomt': tuned('test_vit', 'eomt', img_size=(80, 48)),
        'dinov3': tuned('vit_small_patch16_dinov3', 'eomt', img_size=(80, 48), depth=4, embed_dim=64, num_heads=2),
    }
    script = tmp_path / 'load.py'
    lines = [LOAD.replace('sys.argv[1:]', repr([name, 'images.pt', f'{name}.pt'])) for name in models]
    script.write_text('\n'.join(lines))
    for name, model in models.items():
        export_segmentation_model(model, str(tmp_path / name), class_names=['a', 'b', 'c', 'd'])
    launch([sys.executable, str(script)])
    for name, model in models.items():
        with torch.inference_mode():
            assert torch.equal(torch.load(tmp_path / f'{name}.pt'), model(images)), name


def test_names_of_classes_and_preprocessing_come_back(exported):
    model = load_segmentation_model(exported)
    assert model.class_names == ['a', 'b', 'c', 'd']
    assert model.data_config == {'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.3, 0.1], 'interpolation': 'bilinear'}
    assert model.img_size == (64, 64)


def edit(folder, change):
    path = folder / 'segmentation.json'
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    'key', ['head', 'num_classes', 'class_names', 'img_size', 'mean', 'std', 'interpolation', 'reductions', 'backbone']
)
def test_a_description_without_a_key_is_refused_by_its_name(exported, key):
    edit(exported, lambda config: config.pop(key))
    with pytest.raises(ValueError, match=f'description of a segmentation model in .*{key}'):
        load_segmentation_model(exported)


@pytest.mark.parametrize('text', ['', '{"head": ', '[]', '"text"', '\0'], ids=repr)
def test_a_corrupt_description_is_refused(exported, text):
    (exported / 'segmentation.json').write_text(text)
    with pytest.raises(ValueError, match='description of a segmentation model in '):
        load_segmentation_model(exported)


WRONG = {
    'head': ['unet', 3, None, ['fcn']],
    'num_classes': [0, -1, 257, 2.0, True, '4', 10**12],
    'class_names': [['a'], 'abcd', [1, 2, 3, 4], ['a', 'b', 'c', 'd' * 2000]],
    'img_size': [64, [64], [64, 0], [64, 10**6], [64.5, 64], ['64', '64'], [True, 64], [64, 64, 64]],
    'mean': [0.5, [], ['0.5'] * 3, [float('nan')] * 3, [10**400] * 3, None],
    'std': [[10**400] * 3, [0.0] * 3, [-1] * 3, [0.5], [float('inf')] * 3],
    'interpolation': ['lanczos', 2, None, {}],
    'reductions': [[], [0], ['8'], 8, [8.0], None],
    'backbone': [None, [], 'test_resnet'],
}


@pytest.mark.parametrize(('key', 'value'), [(key, value) for key, values in WRONG.items() for value in values], ids=str)
def test_a_field_that_is_not_what_it_should_be_is_refused_by_its_name(exported, key, value):
    edit(exported, lambda config: config.update({key: value}))
    with pytest.raises(ValueError, match=rf'(?s)description of a segmentation model in .*{key}'):
        load_segmentation_model(exported)


@pytest.mark.parametrize(
    'name',
    ['hf-hub:me/model', 'local-dir:/tmp', '../model', 'no_such_model', 'test_resnet ', '', None, ['test_resnet']],
    ids=repr,
)
def test_an_architecture_that_is_no_timm_model_is_refused(exported, name):
    edit(exported, lambda config: config['backbone'].update(architecture=name))
    with pytest.raises(ValueError, match='the name of a timm model as the architecture in .*segmentation.json'):
        load_segmentation_model(exported)


@pytest.mark.parametrize(
    'argument',
    [
        {'checkpoint_path': 'SECRET'},
        {'pretrained': True},
        {'pretrained_cfg': {'file': 'SECRET'}},
        {'pretrained_cfg': 'a1_in1k'},
        {'pretrained_cfg_overlay': {'url': 'http://127.0.0.1:9/m.pth', 'hf_hub_id': None}},
        {'cache_dir': 'SECRET'},
        {'pretrained_filter_fn': 'x'},
        {'features_only': True},
        {'feature_cls': 'fx'},
        {'kwargs': {'checkpoint_path': 'SECRET'}},
        {'self': 1},
        {'act_layer': 'os.system("ls")'},
        {'drop_rate': float('nan')},
        {'channels': [10**9]},
        {'channels': [[[[[1]]]]]},
        {'a b': 1},
        ['checkpoint_path'],
        'checkpoint_path=SECRET',
    ],
    ids=str,
)
def test_arguments_that_do_more_than_build_layers_are_refused_and_no_file_is_opened(exported, tmp_path, argument):
    secret = tmp_path / 'secret.pth'
    torch.save({}, secret)
    text = json.dumps(argument).replace('SECRET', str(secret))
    opened = []
    hooks.append(lambda event, args: event == 'open' and opened.append(str(args[0])))
    edit(exported, lambda config: config['backbone'].update(model_args=json.loads(text)))
    try:
        with pytest.raises(ValueError, match=r'(model_args|timm would load weights) .*segmentation.json'):
            load_segmentation_model(exported)
    finally:
        hooks.clear()
    assert str(exported / 'segmentation.json') in opened
    assert str(secret) not in opened


def test_arguments_that_build_layers_are_taken(tmp_path):
    kwargs = {'depth': 2, 'init_values': 1e-5, 'qkv_bias': False, 'reg_tokens': 3, 'act_layer': 'gelu_tanh'}
    model = create('vit_tiny_patch16_224', **kwargs, norm_layer='layernorm').eval()
    export_segmentation_model(model, str(tmp_path), DATA_CONFIG)
    images = torch.randn(1, 3, 64, 64)
    loaded = load_segmentation_model(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize('kwargs', [{'embed_dim': 16384, 'depth': 32}, {'depth': 3, 'num_classes': 10**6}], ids=str)
def test_a_description_of_a_larger_model_than_its_weights_takes_no_memory(tmp_path, kwargs):
    export_segmentation_model(create('vit_tiny_patch16_224', depth=2), str(tmp_path), DATA_CONFIG)
    edit(tmp_path, lambda config: config['backbone'].update(model_args={'num_heads': 1, 'img_size': 64, **kwargs}))
    with pytest.raises(ValueError, match=r'backbone has [0-9,]{11,} values, the weights have [0-9,]+\.'):
        load_segmentation_model(tmp_path)


@pytest.mark.parametrize(
    'text', ['[' * 100_000, '{"a":' * 100_000, '"' + 'x' * 2**24 + '"'], ids=['list', 'object', 'long']
)
def test_a_description_that_is_no_description_at_all_is_refused(exported, text):
    (exported / 'segmentation.json').write_text(text)
    with pytest.raises(ValueError, match='description of a segmentation model in .*(nested too deeply|longer than)'):
        load_segmentation_model(exported)


def test_a_pipe_in_place_of_a_description_is_not_waited_for(exported):
    (exported / 'segmentation.json').unlink()
    os.mkfifo(exported / 'segmentation.json')
    with pytest.raises(ValueError, match='no regular file') as error:
        load_segmentation_model(exported)
    assert str(error.value).count(str(exported)) == 1


def test_maps_of_another_size_are_refused(exported):
    edit(exported, lambda config: config['backbone'].update(model_args={}))
    with pytest.raises(ValueError, match=r'1/\[8\].*1/\[32\].*output_stride'):
        load_segmentation_model(exported)


def test_a_model_that_was_padded_by_rounded_reductions_still_predicts_the_same(tmp_path):
    model = tuned('test_convnext', img_size=(100, 100))
    images = torch.randn(1, 3, 100, 70)
    export_segmentation_model(model, str(tmp_path))
    edit(tmp_path, lambda config: config.update(reductions=[4, 9, 17, 34]))  # as earlier versions wrote
    loaded = load_segmentation_model(tmp_path)
    assert loaded.maps.reductions == [4, 9, 17, 34]
    padded = F.pad(images, (0, 102 - 70, 0, 102 - 100))  # to multiples of 34
    with torch.inference_mode():
        maps = model.backbone.forward_intermediates(
            padded, indices=model.maps.indices, norm=False, intermediates_only=True
        )
        logits = model.forward_head(maps)
        expected = F.interpolate(logits, size=(102, 102), mode='bilinear')[..., :100, :70]
        assert torch.equal(loaded(images), expected)
        assert not torch.equal(model(images), expected)


def test_weights_of_another_model_or_broken_ones_are_refused(exported):
    path = exported / 'segmentation.safetensors'
    weights = load_file(path)
    for other in ({**weights, 'more': torch.zeros(1)}, {k: v for k, v in weights.items() if k != 'classifier.bias'}):
        save_file(other, path)
        with pytest.raises(ValueError, match='weights that .* describes'):
            load_segmentation_model(exported)
    path.write_bytes(b'no weights')
    with pytest.raises(ValueError, match='weights that .* describes'):
        load_segmentation_model(exported)
    path.unlink()
    with pytest.raises(ValueError, match='beside segmentation.json'):
        load_segmentation_model(exported)
