"""Segmentation models of timm's families"""

from importlib import resources
from typing import Any, Dict, List, NamedTuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from segmentation_models import NUM_CLASSES, create, tuned

from timm_coretune.segmentation import SegmentationTask, create_segmentation_model
from timm_coretune.segmentation.decoder import _BatchNormOfOne

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
    assert 'output' not in result
    assert model(images).shape == (2, NUM_CLASSES, *size)
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


@pytest.mark.parametrize(
    ('head', 'reductions'), [('deeplabv3', [32]), ('fcn', [32]), ('fpn', PYRAMID), ('linear', [32])]
)
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
        (('test_resnet', NUM_CLASSES, 'unet'), "deeplabv3, fcn, fpn, linear, eomt, got 'unet'"),
        (('test_resnet', 0), 'num_classes >= 1, got 0'),
        (('test_convnext', NUM_CLASSES, 'eomt'), 'VisionTransformer or Eva .* got ConvNeXt'),
        ((timm.create_model('test_vit', patch_drop_rate=0.5), NUM_CLASSES, 'eomt'), 'got one with patch dropout'),
        ((WithoutMaps(), NUM_CLASSES), 'forward_intermediates.*WithoutMaps'),
        (('mixer_s32_224', NUM_CLASSES, None, (64, 64)), 'MlpMixer that takes images of 64 x 64'),
    ],
    ids=['head', 'classes', 'not plain', 'patch dropout', 'no maps', 'size'],
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


def sides_of_maps(name, size, **kwargs):
    """Sides of the feature maps of an image that a multiple of 64 divides: nothing is rounded."""
    backbone = timm.create_model(name, num_classes=0, **kwargs).eval()
    with torch.no_grad():
        return {64 * size // m.shape[2] for m in backbone.forward_intermediates(
            torch.zeros(1, 3, 64 * size, 64 * size), intermediates_only=True
        )}  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'sizes', 'head', 'kwargs'),
    [
        ('test_convnext', (100, 230, 65), 'fpn', {}),
        ('test_resnet', (65, 66), 'fpn', {}),
        ('test_resnet', (65, 90), 'deeplabv3', {'output_stride': 16}),
        ('convnext_atto', (250,), 'deeplabv3', {'output_stride': 16}),
        ('densenet121', (100,), 'fpn', {}),
        ('hrnet_w18_small', (100,), 'fpn', {}),
    ],
    ids=['convnext', 'resnet', 'resnet-16', 'convnext-16', 'densenet', 'hrnet'],
)
def test_reductions_are_those_of_the_strides_whatever_the_size(name, sizes, head, kwargs):
    expected = sides_of_maps(name, 1 if head == 'fpn' else 2, **kwargs)
    for size in sizes:
        model = create(name, img_size=(size, size + 1), **kwargs)
        assert (model.head, model.maps.reductions) == (head, sorted(expected)[-len(model.maps.reductions) :])
        assert model.maps.reductions == (PYRAMID if head == 'fpn' else [16])
        if head == 'deeplabv3':  # the rates of maps of 1/16
            rates = {m.dilation[0] for m in model.decoder.modules() if isinstance(m, nn.Conv2d)}
            assert rates == {1, 6, 12, 18}


def test_a_model_for_one_size_says_which_size_it_could_take():
    with pytest.raises(ValueError, match='multiples of 14, .* of Eva, got 50 x 50.* to 56 x 56: choose that'):
        create('eva02_tiny_patch14_224', img_size=(50, 50), depth=2)
    model = create('swin_tiny_patch4_window7_224', img_size=(90, 90), depths=(1, 1, 1, 1)).eval()
    assert model(torch.randn(1, 3, 90, 90)).shape == (1, NUM_CLASSES, 90, 90)


def test_a_compiled_model_takes_images_of_one_unaligned_size_after_another():
    model = create('test_resnet', output_stride=8)
    patches = nn.Conv2d(3, NUM_CLASSES, 8, stride=8)  # in place of a whole model, which takes long to compile

    def logits(images):
        padded = model.pad(images)
        output = F.interpolate(patches(padded), size=padded.shape[-2:], mode='bilinear')
        return output[..., : images.shape[2], : images.shape[3]]

    compiled = torch.compile(logits, backend='aot_eager')
    for size in [(64, 64), (65, 70), (77, 91)]:
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(compiled(images), logits(images))


def test_parts_that_were_left_in_evaluation_mode_stay_there():
    backbone = timm.create_model('test_resnet', num_classes=0)
    frozen = [m for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d) and 'layer1' in name]
    for module in frozen:
        module.eval()
    before = {name: module.training for name, module in backbone.named_modules()}
    assert set(before.values()) == {True, False}
    create_segmentation_model(backbone, NUM_CLASSES, img_size=(65, 65))
    assert {name: module.training for name, module in backbone.named_modules()} == before
