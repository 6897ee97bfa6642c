"""A self-supervised file loads whole into a timm model, or not at all

Fixtures are the key layouts that the methods' own training scripts write, around the tensors of real timm models.
"""

import os
import subprocess
import sys
from importlib import resources

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_coretune import load_checkpoint

SAMPLE = str(resources.files('timm_coretune') / 'assets' / 'test_resnet_mocov2.safetensors')


def backbone(seed=1):
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', num_classes=0)
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}


def prefixed(prefix, state_dict):
    return {prefix + k: v for k, v in state_dict.items()}


def layouts(state_dict):
    """Files by method: the backbone that must be taken, beside everything else such a file holds."""
    other = backbone(seed=2)
    head = {'fc.0.weight': torch.zeros(8, 96), 'fc.2.bias': torch.zeros(8)}
    moco = {
        **prefixed('module.encoder_q.', {**state_dict, **head}),
        **prefixed('module.encoder_k.', {**other, **head}),
        'module.queue': torch.zeros(8, 16),
    }
    moco_v3 = {
        **prefixed('module.base_encoder.', {**state_dict, 'fc.weight': torch.zeros(8, 96)}),
        **prefixed('module.momentum_encoder.', other),
        'module.predictor.0.weight': torch.zeros(8, 8),
    }
    simsiam = {
        **prefixed('module.encoder.', {**state_dict, **head}),
        'module.predictor.0.bias': torch.zeros(8),
    }
    swav = {
        **state_dict,
        'projection_head.0.weight': torch.zeros(8, 96),
        'prototypes.weight': torch.zeros(4, 8),
    }
    return {
        'moco-v2': {'state_dict': moco, 'epoch': 200},
        'moco-v3': {'state_dict': moco_v3},
        'simsiam': {'state_dict': simsiam},
        'solo-learn': {'state_dict': {**prefixed('backbone.', state_dict), **prefixed('momentum_backbone.', other)}},
        'swav': prefixed('module.', swav),
        'barlow-twins': state_dict,
        'without-counters': {k: v for k, v in state_dict.items() if 'num_batches' not in k},
    }


@pytest.mark.parametrize('name', layouts({}))
def test_every_backbone_tensor_of_a_published_layout_is_loaded(name, tmp_path):
    state_dict = backbone()
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(layouts(state_dict)[name], path)
    model = timm.create_model('test_resnet', num_classes=7)
    classifier = model.fc.weight.clone()
    report = load_checkpoint(model, str(path))
    for key, value in model.state_dict().items():
        if key.startswith('fc.'):
            continue
        if 'num_batches' not in key:
            assert torch.equal(value, state_dict[key]), key
            assert key in report.loaded
    assert torch.equal(model.fc.weight, classifier)
    assert not report.classifier


def test_the_bundled_file_gives_the_query_encoder():
    from safetensors.torch import load_file

    tensors = load_file(SAMPLE)
    model = timm.create_model('test_resnet', num_classes=10)
    assert load_checkpoint(model, SAMPLE).rule.method == 'MoCo v1/v2'
    assert torch.equal(model.conv1[0].weight, tensors['module.encoder_q.conv1.0.weight'])
    assert not torch.equal(model.conv1[0].weight, tensors['module.encoder_k.conv1.0.weight'])


def test_a_classifier_is_loaded_only_where_asked_for_and_fitting(tmp_path):
    source = timm.create_model('test_resnet', num_classes=5)
    path = str(tmp_path / 'tuned.safetensors')
    save_file(source.state_dict(), path)
    model = timm.create_model('test_resnet', num_classes=5)
    assert not load_checkpoint(model, path).classifier
    assert not torch.equal(model.fc.weight, source.fc.weight)
    assert load_checkpoint(model, path, load_classifier=True).classifier
    assert torch.equal(model.fc.weight, source.fc.weight)
    other = timm.create_model('test_resnet', num_classes=6)
    assert not load_checkpoint(other, path, load_classifier=True).classifier


class Evil:
    def __reduce__(self):
        return os.system, ('touch marker',)


def no_file(path):
    pass


def empty(path):
    path.touch()


def text(path):
    path.write_text('<html>404 Not Found</html>')


def truncated(path):
    torch.save(backbone(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def pickled_code(path):
    torch.save({'state_dict': Evil()}, path)


def no_tensors(path):
    torch.save({'state_dict': {'epoch': 3}}, path)


def half_the_backbone(path):
    torch.save({k: v for k, v in backbone().items() if not k.startswith('layer4')}, path)


def larger_network(path):
    torch.save({**backbone(), **prefixed('layer4.1.', {'conv1.weight': torch.zeros(3)})}, path)


def other_width(path):
    torch.save({k: torch.cat([v, v]) if v.ndim else v for k, v in backbone().items()}, path)


@pytest.mark.parametrize(
    'make, message',
    [
        (no_file, 'found none at'),
        (empty, 'could not read'),
        (text, 'could not read'),
        (truncated, 'could not read'),
        (pickled_code, 'could not read'),
        (no_tensors, 'Expected tensors by name'),
        (half_the_backbone, r'15 are missing \(layer4'),
        (larger_network, 'have no place in the model .*layer4.1.conv1.weight'),
        (other_width, 'have another shape'),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_any_other_file_is_refused_and_the_model_left_alone(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'checkpoint.pth'
    make(path)
    model = timm.create_model('test_resnet', num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, str(path))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not (tmp_path / 'marker').exists()


def test_the_marker_of_the_attack_would_appear_if_it_were_unpickled(tmp_path):
    torch.save({'state_dict': Evil()}, tmp_path / 'evil.pth')
    code = "import torch; torch.load('evil.pth', weights_only=False)"
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / 'marker').exists()
