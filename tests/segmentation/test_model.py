"""Segmentation models of timm's families, their files, and the masks they predict"""

import json
import sys
from importlib import resources
from typing import Any, Dict, List, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_coretune.segmentation import (
    SegmentationTask,
    create_segmentation_model,
    export_segmentation_model,
    load_segmentation_model,
    predict_image,
)
from timm_coretune.segmentation.__main__ import run as run_command
from timm_coretune.segmentation.data import scenes as sample
from timm_coretune.segmentation.data.masks import read_mask
from timm_coretune.segmentation.data.palette import voc_palette
from timm_coretune.segmentation.decoder import _BatchNormOfOne
from timm_coretune.segmentation.predict import find_images, predict

NUM_CLASSES = 4
PYRAMID = [4, 8, 16, 32]


class Case(NamedTuple):
    """Size of the images, what is expected of the model, and whether it takes images of another size too."""

    img_size: int = 64
    reductions: List[int] = PYRAMID
    any_size: bool = True
    kwargs: Dict[str, Any] = {}


CASES = {
    'test_resnet': Case(),
    'test_vit': Case(64, [16]),
    'test_convnext': Case(),
    'test_efficientnet': Case(),
    'test_maxvit': Case(any_size=False),
    'test_coatnet': Case(any_size=False),
    'test_nfnet': Case(),
    'test_byobnet': Case(),
    'test_mambaout': Case(),
    'swin_tiny_patch4_window7_224': Case(any_size=False, kwargs={'depths': (1, 1, 1, 1)}),
    'mobilenetv3_small_050': Case(),
    'regnetx_002': Case(),
    'edgenext_xx_small': Case(),
    'fastvit_t8': Case(),
    'pvt_v2_b0': Case(),
    'xcit_nano_12_p16_224': Case(64, [16]),
    'hrnet_w18_small': Case(),
    'vit_small_patch16_dinov3': Case(64, [16], kwargs={'depth': 2}),
    'eva02_tiny_patch14_224': Case(56, [14], any_size=False, kwargs={'depth': 2}),
    'mixer_s32_224': Case(64, [32], any_size=False, kwargs={'img_size': 64}),
}


def create(name='test_resnet', head=None, img_size=(64, 64), seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_segmentation_model(name, NUM_CLASSES, head, img_size, **kwargs)


def tuned(*args, **kwargs):
    """A model whose statistics and head are not those of a fresh one, in evaluation mode."""
    model = create(*args, **kwargs).train()
    with torch.no_grad():
        coarse = torch.randn(3, 3, 9, 9) * 2
        images = F.interpolate(coarse, model.img_size, mode='bilinear')
        model(images)
        logits = model.eval()(images)
        model.classifier.bias -= logits.mean(dim=(0, 2, 3))  # every class is predicted somewhere
    return model


# Families


@pytest.mark.parametrize('name', CASES)
def test_a_family_trains_whatever_its_maps_depend_on(name):
    case = CASES[name]
    size = (case.img_size, case.img_size)
    plain = timm.create_model(name, num_classes=0, **case.kwargs)
    model = create(timm.create_model(name, num_classes=0, **case.kwargs), img_size=size)
    assert model.maps.reductions == case.reductions
    assert model.head == ('fpn' if len(case.reductions) > 1 else 'deeplabv3')
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    assert [key for key in model.state_dict() if key.startswith('backbone.')] == [
        f'backbone.{key}' for key in plain.state_dict()
    ]
    if case.any_size:
        size = (case.img_size + 9, case.img_size - 5)
    images, target = torch.randn(2, 3, *size), torch.randint(NUM_CLASSES, (2, *size))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(True)
    result = SegmentationTask(model, verbose=False).train()(images, target)
    assert result['output'].shape == (2, NUM_CLASSES, *size)
    result['loss'].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(('output_stride', 'reductions'), [(8, [8]), (16, [16])])
def test_dilated_convolutions_make_one_map(output_stride, reductions):
    model = create('test_resnet', output_stride=output_stride)
    assert (model.head, model.maps.reductions) == ('deeplabv3', reductions)
    features, logits, output = model.forward_pixels(torch.randn(2, 3, 64, 96))
    assert features.shape == (2, model.num_features, 64 // output_stride, 96 // output_stride)
    assert logits.shape == (2, NUM_CLASSES, 64 // output_stride, 96 // output_stride)
    rates = [m.dilation[0] for m in model.decoder.modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1]
    assert rates == {8: [12, 24, 36], 16: [6, 12, 18]}[output_stride]


@pytest.mark.parametrize(('head', 'reductions'), [('deeplabv3', [32]), ('fcn', [32]), ('fpn', PYRAMID)])
def test_a_head_that_is_named_decides_on_the_maps(head, reductions):
    model = create('test_convnext', head).eval()
    assert (model.head, model.maps.reductions) == (head, reductions)
    assert model(torch.randn(1, 3, 65, 70)).shape == (1, NUM_CLASSES, 65, 70)


def test_logits_of_the_image_are_those_of_the_map_interpolated_and_cropped():
    model = tuned('test_resnet', 'fcn', output_stride=8)
    images = torch.randn(2, 3, 45, 59)
    padded = torch.zeros(2, 3, 48, 64)
    padded[:, :, :45, :59] = images
    features, logits, output = model.forward_pixels(images)
    (last,) = model.backbone.forward_intermediates(padded, indices=[4], intermediates_only=True)
    torch.testing.assert_close(features, nn.Sequential(*model.decoder)(last))
    rows = features.permute(0, 2, 3, 1) @ model.classifier.weight.flatten(1).T + model.classifier.bias
    torch.testing.assert_close(logits, rows.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    expected = F.interpolate(logits, scale_factor=8, mode='bilinear')[..., :45, :59]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(model(images), model(padded)[..., :45, :59])


class WithoutMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        (('test_resnet', NUM_CLASSES, 'unet'), "deeplabv3, fcn, fpn, got 'unet'"),
        (('test_resnet', 0), 'num_classes >= 1, got 0'),
        ((WithoutMaps(), NUM_CLASSES), 'forward_intermediates.*WithoutMaps'),
        (('mixer_s32_224', NUM_CLASSES, None, (64, 64)), 'MlpMixer that takes images of 64 x 64'),
    ],
    ids=['head', 'classes', 'no maps', 'size'],
)
def test_what_cannot_be_made_is_refused_with_a_sentence(arguments, told):
    with pytest.raises(ValueError, match=told):
        create_segmentation_model(*arguments)


def test_arguments_of_the_backbone_need_its_name():
    with pytest.raises(ValueError, match='output_stride'):
        create_segmentation_model(timm.create_model('test_resnet'), NUM_CLASSES, output_stride=8)


def test_position_embeddings_and_windows_are_resized():
    original = timm.create_model('test_vit').pos_embed.shape[1]
    model = create('test_vit', img_size=(64, 96))
    assert original != 1 + 4 * 6
    assert model.backbone.pos_embed.shape[1] == 1 + 4 * 6
    assert model.img_size == (64, 96)
    swin = create('swin_tiny_patch4_window7_224', img_size=(96, 96), depths=(1, 1, 1, 1)).eval()
    assert swin.img_size == (96, 96)
    assert swin(torch.randn(1, 3, 96, 96)).shape == (1, NUM_CLASSES, 96, 96)


def test_a_self_supervised_checkpoint_is_loaded_into_the_backbone():
    path = str(resources.files('timm_coretune') / 'assets' / 'test_resnet_mocov2.safetensors')
    stored = load_file(path)
    (stem,) = (
        value for key, value in stored.items() if key.endswith('encoder_q.conv1.0.weight') or key == 'conv1.0.weight'
    )
    model = create('test_resnet', checkpoint=path)
    assert torch.equal(model.backbone.state_dict()['conv1.0.weight'], stem)
    assert not torch.equal(create('test_resnet').backbone.state_dict()['conv1.0.weight'], stem)


def test_the_norm_of_one_pooled_image_takes_the_running_statistics_and_that_of_more_their_own():
    ours, torchs = _BatchNormOfOne(5).train(), nn.BatchNorm2d(5).train()
    images = torch.randn(4, 5, 1, 1) * 3 + 2
    assert torch.equal(ours(images), torchs(images))
    for name, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    alone = ours(images[:1])
    assert torch.equal(alone, torchs.eval()(images[:1]))
    assert torch.equal(ours.running_mean, torchs.running_mean)  # a single image leaves no trace in them
    assert torch.equal(ours.eval()(images), torchs(images))
    larger = torch.randn(1, 5, 2, 3)
    assert torch.equal(ours.train()(larger), torchs.train()(larger))


# Files


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


@pytest.fixture
def exported(tmp_path):
    model = tuned('test_resnet', output_stride=8)
    data_config = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.1), 'interpolation': 'bilinear'}
    export_segmentation_model(model, str(tmp_path / 'model'), data_config, ['a', 'b', 'c', 'd'])
    return tmp_path / 'model'


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


# Prediction


def picture(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)


def predict_by_hand(model, image):
    """The whole image at its aspect ratio in the upper left, the mean around it, and logits back to its size."""
    width, height = image.size
    scale = min(model.img_size[0] / height, model.img_size[1] / width)
    content = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, content, mode='bilinear', antialias=True) / 255
    mean, std = (torch.tensor(model.data_config[key])[:, None, None] for key in ('mean', 'std'))
    canvas = torch.zeros(1, 3, *model.img_size)
    canvas[..., : content[0], : content[1]] = (pixels - mean) / std
    with torch.inference_mode():
        logits = model(canvas)[..., : content[0], : content[1]]
        return F.interpolate(logits, (height, width), mode='bilinear')[0].argmax(dim=0)


@pytest.mark.parametrize('size', [(64, 64), (31, 77), (150, 41), (33, 20), (3, 200)], ids=str)
def test_a_mask_has_the_size_of_its_image_and_is_what_validation_computes(exported, size):
    model = load_segmentation_model(exported)
    image = picture(size)
    mask = predict_image(model, image)
    assert (mask.shape, mask.dtype) == ((size[1], size[0]), torch.uint8)
    expected = predict_by_hand(model, image)
    assert torch.equal(mask.long(), expected)
    assert len(expected.unique()) > 1
    as_tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(predict_image(model, as_tensor), mask)


def test_masks_are_palette_files_and_those_that_are_there_are_left_alone(exported, tmp_path):
    model = load_segmentation_model(exported)
    images, output = tmp_path / 'images', tmp_path / 'masks'
    images.mkdir()
    for seed, name in enumerate(['a.png', 'b.jpg', 'c.PNG']):
        picture((37, 52), seed).save(images / name)
    (images / 'notes.txt').write_text('no image')
    assert predict(model, [str(images)], str(output)) == 3
    assert sorted(path.name for path in output.iterdir()) == ['a.png', 'b.png', 'c.png']
    expected = predict_image(model, Image.open(images / 'c.PNG'))
    assert torch.equal(read_mask(output / 'c.png', 'c'), expected)
    with Image.open(output / 'c.png') as mask:
        assert mask.mode == 'P'
        palette = mask.getpalette()
        assert palette == voc_palette()[: len(palette)]
    (output / 'a.png').write_text('mine')
    (output / 'b.png').unlink()
    assert predict(model, [str(images)], str(output)) == 1
    assert (output / 'a.png').read_text() == 'mine'
    assert predict(model, [str(images)], str(output), overwrite=True) == 3
    assert read_mask(output / 'a.png', 'a').shape == (52, 37)


def test_images_of_the_same_name_no_images_and_unreadable_ones_are_refused(exported, tmp_path):
    picture((20, 20)).save(tmp_path / 'a.png')
    picture((20, 20)).save(tmp_path / 'a.jpg')
    with pytest.raises(ValueError, match=r'a\.jpg.*a\.png.*same mask'):
        find_images([str(tmp_path)])
    assert find_images([str(tmp_path / 'a.png')] * 2) == [str(tmp_path / 'a.png')] * 2
    with pytest.raises(ValueError, match='found none'):
        find_images([str(exported)])
    (tmp_path / 'broken.png').write_bytes((tmp_path / 'a.png').read_bytes()[:60])
    model = load_segmentation_model(exported)
    for path in (tmp_path / 'broken.png', tmp_path / 'missing.png'):
        with pytest.raises(ValueError, match=f'Expected an image in .*{path.name}'):
            predict(model, [str(path)], str(tmp_path / 'masks'))


def test_the_commands_write_a_sample_and_masks(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, 'NUM_SCENES', (6, 3))
    run_command(['sample', 'scenes'])
    assert capsys.readouterr().out == 'Written: scenes\n'
    lists = {path.stem: path.read_text().split() for path in (tmp_path / 'scenes').rglob('*.txt')}
    pictures = sorted((tmp_path / 'scenes').rglob('JPEGImages/*'))
    masks = sorted((tmp_path / 'scenes').rglob('SegmentationClass/*.png'))
    assert [path.stem for path in pictures] == [path.stem for path in masks]
    assert {name: len(lines) for name, lines in lists.items()} == {'train': 6, 'validation': 3, 'classes': 12}
    assert sorted(lists['train'] + lists['validation']) == [path.stem for path in pictures]
    image = str(pictures[0])
    run_command(['predict', str(exported), image, '--output', 'masks', '--device', 'cpu'])
    assert capsys.readouterr().out == 'Written: 1 masks to masks\n'
    model = load_segmentation_model(exported)
    with Image.open(image) as opened:
        expected = predict_image(model, opened)
    assert torch.equal(read_mask(tmp_path / 'masks' / f'{pictures[0].stem}.png', 'mask'), expected)
    with pytest.raises(SystemExit) as stopped:
        run_command(['predict', 'elsewhere', image, '--output', 'masks'])
    assert stopped.value.code == 2
    assert "found none at 'elsewhere'" in capsys.readouterr().err
