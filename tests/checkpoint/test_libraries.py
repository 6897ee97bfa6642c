"""Files that other libraries write: the timm model computes what the original module computes, to 1e-5"""

import copy
import re

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from checkpoint_libraries import LIGHTLY
from library_outputs import TOLERANCE, image, largest_difference, randomize
from safetensors.torch import save_file
from timm.models import regnet as timm_regnet
from torchvision.models import regnet, swin_transformer

from timm_coretune import load_checkpoint


def lightly_module(method, torchvision_backbone):
    """A module as lightly's examples put it together, with lightly's own heads."""
    heads = pytest.importorskip('lightly.models.modules.heads', reason="needs the 'test-formats' extra")
    utils = pytest.importorskip('lightly.models.utils')

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            backbone = nn.Sequential(*list(torchvision_backbone.children())[:-1])
            width = torchvision_backbone.fc.in_features
            if method == 'DINO':
                self.student_backbone, self.teacher_backbone = copy.deepcopy(backbone), backbone
                self.student_head = heads.DINOProjectionHead(width, 32, 16, 64, freeze_last_layer=1)
                self.teacher_head = heads.DINOProjectionHead(width, 32, 16, 64)
                nn.init.zeros_(self.student_backbone[0].weight)
                return
            self.backbone = backbone
            if method == 'SimCLR':
                self.projection_head = heads.SimCLRProjectionHead(width, 32, 16)
            if method == 'SwAV':
                self.projection_head = heads.SwaVProjectionHead(width, 32, 16)
                self.prototypes = heads.SwaVPrototypes(16, 8)
            if method == 'Barlow Twins':
                self.projection_head = heads.BarlowTwinsProjectionHead(width, 32, 16)
            if method == 'SimSiam':
                self.projection_head = heads.SimSiamProjectionHead(width, 32, 16)
                self.prediction_head = heads.SimSiamPredictionHead(16, 8, 16)
            if method in ('MoCo', 'BYOL'):
                self.projection_head = heads.MoCoProjectionHead(width, 32, 16)
                self.backbone_momentum = copy.deepcopy(self.backbone)
                self.projection_head_momentum = copy.deepcopy(self.projection_head)
                utils.deactivate_requires_grad(self.backbone_momentum)
                nn.init.zeros_(self.backbone_momentum[0].weight)

    return Module()


@pytest.mark.parametrize('network', ['resnet18', 'resnet50'])
@pytest.mark.parametrize('method', LIGHTLY)
def test_a_module_of_lightly_computes_the_same_in_timm(method, network, tmp_path):
    backbone = randomize(getattr(torchvision.models, network)())
    module = lightly_module(method, backbone)
    torch.save({'state_dict': module.state_dict(), 'epoch': 3}, tmp_path / 'last.ckpt')
    model = timm.create_model(network, num_classes=0)
    report = load_checkpoint(model, str(tmp_path / 'last.ckpt'))
    assert report.method.startswith('lightly')
    kept = module.teacher_backbone if method == 'DINO' else module.backbone
    with torch.no_grad():
        expected = kept(image(64)).flatten(1)
    assert largest_difference(model, image(64), expected, pooled=True) < TOLERANCE


@pytest.mark.parametrize('quick_gelu', [False, True], ids=['GELU', 'QuickGELU'])
def test_an_open_clip_model_computes_the_same_in_timm(quick_gelu, tmp_path):
    open_clip = pytest.importorskip('open_clip', reason="needs the 'test-formats' extra")
    vision = dict(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = dict(context_length=8, vocab_size=32, width=32, heads=2, layers=1)
    module = randomize(open_clip.model.CLIP(16, vision, text, quick_gelu=quick_gelu))
    save_file(module.state_dict(), tmp_path / 'open_clip_model.safetensors')
    config = f'{{"model_cfg": {{"quick_gelu": {str(quick_gelu).lower()}}}, "preprocess_cfg": {{}}}}'
    (tmp_path / 'open_clip_config.json').write_text(config)
    name = f'vit_base_patch32_clip_{"quickgelu_" if quick_gelu else ""}224'
    model = timm.create_model(name, num_classes=0, embed_dim=64, depth=2, num_heads=2, patch_size=8, img_size=32)
    assert load_checkpoint(model, str(tmp_path)).method == 'OpenCLIP'
    with torch.no_grad():
        expected = module.encode_image(image(32))
        pooled = model.eval()(image(32))
    assert (pooled @ module.visual.proj - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize('tower', ['vit_tiny_patch16_224', 'convnext_atto'])
def test_an_open_clip_model_with_a_timm_tower_computes_the_same(tower, tmp_path):
    open_clip = pytest.importorskip('open_clip', reason="needs the 'test-formats' extra")
    pool, size = ('token', 224) if 'vit' in tower else ('avg', 64)
    vision = dict(timm_model_name=tower, timm_pool=pool, timm_proj='linear', image_size=size)
    text = dict(context_length=8, vocab_size=32, width=32, heads=2, layers=1)
    module = randomize(open_clip.model.CustomTextCLIP(16, vision, text))
    torch.save({'state_dict': module.state_dict()}, tmp_path / 'epoch_3.pt')
    model = timm.create_model(tower, num_classes=0)
    assert load_checkpoint(model, str(tmp_path / 'epoch_3.pt')).method == 'OpenCLIP with a timm tower'
    with torch.no_grad():
        expected = module.visual.trunk(image(size))
        assert (model.eval()(image(size)) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize('network', ['resnet18', 'resnet50', 'wide_resnet50_2'])
def test_a_file_of_torchvision_computes_the_same_in_timm(network, tmp_path):
    module = randomize(getattr(torchvision.models, network)())
    torch.save(module.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(network, num_classes=1000)
    assert load_checkpoint(model, str(tmp_path / 'weights.pth'), load_classifier=True).classifier
    with torch.no_grad():
        assert (model.eval()(image(64)) - module(image(64))).abs().max() < TOLERANCE


def torchvision_module(name):
    """A small module of torchvision, the timm model and its arguments, and the size of the image."""
    models = torchvision.models
    swin = dict(patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], num_classes=5)
    timm_swin = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4))
    if name == 'ViT':
        kwargs = dict(embed_dim=48, depth=2, num_heads=3, img_size=32, patch_size=8)
        return models.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=5), 'vit_tiny_patch16_224', kwargs, 32
    if name == 'ConvNeXt':
        settings = [
            models.convnext.CNBlockConfig(*widths) for widths in ((16, 24, 1), (24, 32, 2), (32, 40, 1), (40, None, 1))
        ]
        kwargs = dict(dims=(16, 24, 32, 40), depths=(1, 2, 1, 1))
        return models.ConvNeXt(settings, num_classes=5), 'convnext_tiny', kwargs, 64
    if name == 'Swin':
        module = models.SwinTransformer(window_size=[7, 7], **swin)
        return module, 'swin_tiny_patch4_window7_224', dict(timm_swin, img_size=56), 56
    if name == 'Swin V2':
        parts = dict(block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2)
        module = models.SwinTransformer(window_size=[8, 8], **swin, **parts)
        return module, 'swinv2_tiny_window8_256', dict(timm_swin, img_size=64), 64
    params = regnet.BlockParams.from_init_params(13, 24, 36.44, 2.49, 8, se_ratio=0.25 if name == 'RegNet Y' else None)
    return models.RegNet(params, num_classes=5), 'regnety_002' if name == 'RegNet Y' else 'regnetx_002', {}, 64


@pytest.mark.parametrize('name', ['ViT', 'ConvNeXt', 'Swin', 'Swin V2', 'RegNet Y', 'RegNet X'])
def test_other_networks_of_torchvision_compute_the_same_in_timm_with_their_classifier(name, tmp_path):
    module, timm_name, kwargs, size = torchvision_module(name)
    randomize(module)
    torch.save(module.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(timm_name, num_classes=5, **kwargs)
    report = load_checkpoint(model, tmp_path / 'weights.pth', load_classifier=True)
    assert (report.method, report.classifier, report.matched) == ('torchvision', True, report.total)
    assert not report.left_over
    with torch.no_grad():
        assert (model.eval()(image(size)) - module(image(size))).abs().max() < TOLERANCE


def test_a_vit_of_torchvision_has_older_names_of_its_mlp_too(tmp_path):
    module, timm_name, kwargs, size = torchvision_module('ViT')
    older = {
        k.replace('.mlp.0.', '.mlp.linear_1.').replace('.mlp.3.', '.mlp.linear_2.'): v
        for k, v in module.state_dict().items()
    }
    torch.save(older, tmp_path / 'weights.pth')
    model = timm.create_model(timm_name, num_classes=0, **kwargs)
    assert not load_checkpoint(model, tmp_path / 'weights.pth').left_over
    with torch.no_grad():
        patches = module._process_input(image(size))
        expected = module.encoder(torch.cat([module.class_token.expand(2, -1, -1), patches], 1))
    assert largest_difference(model, image(size), expected) < TOLERANCE


def test_a_swin_v2_with_other_windows_is_noted(tmp_path):
    module, timm_name, kwargs, size = torchvision_module('Swin V2')
    torch.save(module.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(timm_name, num_classes=0, window_size=4, **kwargs)
    notes = ' '.join(load_checkpoint(model, tmp_path / 'weights.pth').notes)
    assert 'attention windows of 8 x 8, the model has 4 x 4' in notes


def test_a_regnet_of_vissl_is_read_as_timm_reads_it(tmp_path):
    """SEER's files, whose names timm's own filter for the whole file reads too."""
    module, timm_name, _, size = torchvision_module('RegNet Y')
    randomize(module)
    trunk = {}
    for key, value in module.state_dict().items():
        for new, old in (
            (r'^stem\.', 'conv1.stem.'),
            (r'^trunk_output\.block(\d)\.', lambda m: f'res{int(m[1]) + 1}.block{m[1]}.'),
            (r'block\d\.(block\d-\d+)\.', r'\1.'),
            (r'\.proj\.0\.', '.proj.'),
            (r'\.proj\.1\.', '.bn.'),
            (r'\.f\.c\.0\.', '.f.c.'),
            (r'\.f\.c\.1\.', '.f.final_bn.'),
            (r'\.f\.se\.fc1\.', '.f.se.excitation.0.'),
            (r'\.f\.se\.fc2\.', '.f.se.excitation.2.'),
        ):
            key = re.sub(new, old, key)
        trunk[f'_feature_blocks.{key}'] = value
    trunk = {key: value for key, value in trunk.items() if not key.startswith('_feature_blocks.fc.')}
    content = {'classy_state_dict': {'base_model': {'model': {'trunk': trunk, 'heads': {}}}}}
    torch.save(content, tmp_path / 'seer.torch')
    model = timm.create_model(timm_name, num_classes=0)
    report = load_checkpoint(model, tmp_path / 'seer.torch')
    assert (report.method, report.copy, report.left_over) == ('VISSL', 'trunk', ())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in timm_regnet._filter_fn(content).items())
    with torch.no_grad():
        expected = module.trunk_output(module.stem(image(size)))
    assert largest_difference(model, image(size), expected) < TOLERANCE


def test_the_table_that_all_blocks_of_a_beit_share_is_given_to_each(tmp_path):
    """As the authors of BEiT do, of whose files this is."""
    kwargs = dict(embed_dim=48, depth=2, num_heads=3, img_size=32, patch_size=8, num_classes=0)
    shared = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    module = randomize(timm.create_model('beit_base_patch16_224', **kwargs, **shared))
    torch.save({'model': {**module.state_dict(), 'mask_token': torch.zeros(1, 1, 48)}}, tmp_path / 'beit.pth')
    model = timm.create_model('beit_base_patch16_224', **kwargs)
    assert load_checkpoint(model, tmp_path / 'beit.pth').left_over == ()
    with torch.no_grad():
        assert largest_difference(model, image(32), module.forward_features(image(32))) < TOLERANCE
