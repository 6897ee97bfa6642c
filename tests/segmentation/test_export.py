"""Files of a segmentation model"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from segmentation_models import tuned

from timm_coretune.segmentation import export_segmentation_model, load_segmentation_model

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
