"""Files that other libraries write: the timm model computes what the original module computes, to 1e-5"""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from checkpoint_libraries import LIGHTLY
from library_outputs import TOLERANCE, image, largest_difference, randomize
from safetensors.torch import save_file

from timm_coretune import load_checkpoint


def hugging_face(name):
    """Config and model classes, small arguments, timm model, and how to compare the outputs."""
    transformers = pytest.importorskip('transformers', reason="needs the 'test-formats' extra")
    vit = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32)
    timm_vit = dict(embed_dim=48, depth=2, num_heads=3, img_size=32)
    cases = {
        'ResNet-18': ('ResNet', dict(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2] * 4,
                                     layer_type='basic'), 'resnet18', {}),
        'ResNet-50': ('ResNet', dict(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3]),
                      'resnet50', {}),
        'ViT': ('ViT', dict(**vit, patch_size=8, layer_norm_eps=1e-6), 'vit_tiny_patch16_224',
                dict(**timm_vit, patch_size=8)),
        'DINOv2': ('Dinov2', dict(vit, patch_size=8, mlp_ratio=4), 'vit_small_patch14_dinov2',
                   dict(**timm_vit, patch_size=8)),
        'DINOv2 with registers': ('Dinov2WithRegisters', dict(vit, patch_size=8, mlp_ratio=4),
                                  'vit_small_patch14_reg4_dinov2', dict(**timm_vit, patch_size=8)),
        'ConvNeXt': ('ConvNext', dict(hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], layer_norm_eps=1e-6),
                     'convnext_tiny', dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1))),
        'Swin': ('Swin', dict(embed_dim=24, depths=[2, 2], num_heads=[2, 4], image_size=56, window_size=7),
                 'swin_tiny_patch4_window7_224', dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), img_size=56)),
        'CLIP': ('CLIPVision', dict(vit, patch_size=8, hidden_act='quick_gelu'),
                 'vit_base_patch32_clip_quickgelu_224', dict(**timm_vit, patch_size=8)),
        'CLIP with GELU': ('CLIPVision', dict(vit, patch_size=8, hidden_act='gelu'), 'vit_base_patch32_clip_224',
                           dict(**timm_vit, patch_size=8)),
    }  # fmt: skip
    kind, config, timm_name, kwargs = cases[name]
    module = getattr(transformers, f'{kind}Model')(getattr(transformers, f'{kind}Config')(**config))
    return randomize(module), timm_name, kwargs, config.get('image_size', 64)


HF = ('ResNet-18', 'ResNet-50', 'ViT', 'DINOv2', 'DINOv2 with registers', 'ConvNeXt', 'Swin', 'CLIP', 'CLIP with GELU')


@pytest.mark.parametrize('name', HF)
def test_a_folder_of_transformers_computes_the_same_in_timm(name, tmp_path):
    module, timm_name, kwargs, size = hugging_face(name)
    module.save_pretrained(tmp_path)
    model = timm.create_model(timm_name, num_classes=3, **kwargs)
    report = load_checkpoint(model, str(tmp_path))
    assert report.method.startswith('Hugging Face')
    assert report.matched == report.total
    assert not report.left_over
    with torch.no_grad():
        expected = module(image(size)).last_hidden_state
    if name.startswith('CLIP'):  # which normalizes the class token only, and after taking it
        expected = getattr(module, 'vision_model', module).post_layernorm(expected)
    if name == 'Swin':
        expected = expected.unflatten(1, (7, 7))
    if name == 'ConvNeXt':
        expected = module(image(size)).pooler_output
    assert largest_difference(model, image(size), expected, pooled=name == 'ConvNeXt') < TOLERANCE


def test_a_masked_autoencoder_of_transformers_gives_its_encoder(tmp_path):
    transformers = pytest.importorskip('transformers', reason="needs the 'test-formats' extra")
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, layer_norm_eps=1e-6,
        mask_ratio=0.,
    )  # fmt: skip
    module = randomize(transformers.ViTMAEForPreTraining(config))
    module.save_pretrained(tmp_path)
    model = timm.create_model('vit_tiny_patch16_224', embed_dim=48, depth=2, num_heads=3, img_size=32, patch_size=8)
    assert load_checkpoint(model, str(tmp_path)).matched == len(model.state_dict()) - 2
    with torch.no_grad():
        # nothing masked, and the noise keeps the patches in their order
        expected = module.vit(image(32), noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
    assert largest_difference(model, image(32), expected) < TOLERANCE


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
