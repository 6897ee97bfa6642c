"""Files of transformers: the timm model computes what the original module computes, to 1e-5

Each module is read as the folder that `save_pretrained` writes, whose names are those of version 4 and of the Hub, and
as a state dict that torch saves, whose names are those of version 5 in memory.
"""

from typing import Any, Dict, NamedTuple

import pytest
import timm
import torch
from checkpoint_libraries import HUGGING_FACE
from library_outputs import TOLERANCE, image, largest_difference, randomize

from timm_coretune import load_checkpoint
from timm_coretune.checkpoint.architectures import candidates
from timm_coretune.checkpoint.load import open_checkpoint

transformers = pytest.importorskip('transformers', reason="needs the 'test-formats' extra")


class Case(NamedTuple):
    """A module of transformers and its twin in timm.

    Attributes:
        module: Class of transformers.
        config: Arguments of its config.
        model: Name of the timm model.
        kwargs: Arguments of the timm model.
        method: What the report must call it.
        pooled: Whether the pooled outputs are compared, rather than the feature maps or tokens.
        part: Attribute of the module that is the backbone, '' if it is all of it.
    """

    module: str
    config: Dict[str, Any]
    model: str
    kwargs: Dict[str, Any]
    method: str
    pooled: bool = False
    part: str = ''


EPS = dict(layer_norm_eps=1e-6)
VIT = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8
)
TIMM_VIT = dict(embed_dim=48, depth=2, num_heads=3, img_size=32, patch_size=8)
WIDTHS, DEPTHS = [16, 24, 32, 40], [1, 1, 2, 1]
CONVNEXT = dict(hidden_sizes=WIDTHS, depths=DEPTHS)
TIMM_CONVNEXT = dict(dims=WIDTHS, depths=DEPTHS)
REGNET = dict(embedding_size=32, hidden_sizes=[24, 56, 152, 368], depths=[1, 1, 4, 7], groups_width=8)
PYRAMID = dict(hidden_sizes=[16, 32, 40, 64], depths=DEPTHS)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
RELATIVE, SHARED = dict(use_relative_position_bias=True), dict(use_shared_relative_position_bias=True)
NO_CLASS = dict(class_token=False, global_pool='avg', fc_norm=False)

# Models that share all names with another one, which is tried for a file of them
SEEN_AS_OTHERS = ('regnetx_002', 'deit_tiny_distilled_patch16_224')

CASES = {
    'ResNet-18': Case('ResNetModel', dict(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2] * 4,
                                          layer_type='basic'), 'resnet18', {}, 'Hugging Face ResNet, RegNet'),
    'ResNet-50': Case('ResNetModel', dict(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3]),
                      'resnet50', {}, 'Hugging Face ResNet, RegNet'),
    'ViT': Case('ViTModel', dict(VIT, **EPS), 'vit_tiny_patch16_224', TIMM_VIT, 'Hugging Face ViT, MAE, DINOv2'),
    'DINOv2': Case('Dinov2Model', dict(VIT, mlp_ratio=4), 'vit_small_patch14_dinov2', TIMM_VIT,
                   'Hugging Face ViT, MAE, DINOv2'),
    'DINOv2 gated': Case('Dinov2Model', dict(VIT, mlp_ratio=4, use_swiglu_ffn=True), 'vit_giant_patch14_dinov2',
                         dict(TIMM_VIT, mlp_ratio=2.66667 * 2), 'Hugging Face ViT, MAE, DINOv2'),
    'DINOv2 with registers': Case('Dinov2WithRegistersModel', dict(VIT, mlp_ratio=4), 'vit_small_patch14_reg4_dinov2',
                                  TIMM_VIT, 'Hugging Face ViT, MAE, DINOv2'),
    'ConvNeXt': Case('ConvNextModel', dict(CONVNEXT, **EPS), 'convnext_tiny', TIMM_CONVNEXT, 'Hugging Face ConvNeXt',
                     True),
    'Swin': Case('SwinModel', dict(embed_dim=24, depths=[2, 2], num_heads=[2, 4], image_size=56, window_size=7),
                 'swin_tiny_patch4_window7_224', dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), img_size=56),
                 'Hugging Face Swin'),
    'CLIP': Case('CLIPVisionModel', dict(VIT, hidden_act='quick_gelu'), 'vit_base_patch32_clip_quickgelu_224', TIMM_VIT,
                 'Hugging Face CLIP'),
    'CLIP with GELU': Case('CLIPVisionModel', dict(VIT, hidden_act='gelu'), 'vit_base_patch32_clip_224', TIMM_VIT,
                           'Hugging Face CLIP'),
    'DINOv3': Case('DINOv3ViTModel', dict(VIT, num_register_tokens=4), 'vit_small_patch16_dinov3_qkvb', TIMM_VIT,
                   'Hugging Face DINOv3'),
    'DINOv3 gated': Case('DINOv3ViTModel', dict(VIT, num_register_tokens=4, use_gated_mlp=True, hidden_act='silu'),
                         'vit_small_plus_patch16_dinov3_qkvb', TIMM_VIT, 'Hugging Face DINOv3'),
    'DINOv3 ConvNeXt': Case('DINOv3ConvNextModel', CONVNEXT, 'convnext_tiny', TIMM_CONVNEXT, 'Hugging Face DINOv3',
                            True),
    'ConvNeXtV2': Case('ConvNextV2ForImageClassification', dict(CONVNEXT, **EPS), 'convnextv2_tiny', TIMM_CONVNEXT,
                       'Hugging Face ConvNeXt', True, 'convnextv2'),
    'BEiT': Case('BeitModel', dict(VIT, **EPS, **RELATIVE), 'beit_base_patch16_224', TIMM_VIT,
                 'Hugging Face BEiT, data2vec', True),
    'BEiT for classification': Case('BeitForImageClassification', dict(VIT, **EPS, **RELATIVE),
                                    'beit_base_patch16_224', TIMM_VIT, 'Hugging Face BEiT, data2vec', True, 'beit'),
    'BEiT, table of all blocks': Case('BeitModel', dict(VIT, **EPS, **SHARED), 'beit_base_patch16_224', TIMM_VIT,
                                      'Hugging Face BEiT, data2vec', True),
    'BEiT, table of all blocks in both': Case(
        'BeitModel', dict(VIT, **EPS, **SHARED), 'beit_base_patch16_224',
        dict(TIMM_VIT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True), 'Hugging Face BEiT, data2vec', True),
    'data2vec': Case('Data2VecVisionForImageClassification', dict(VIT, **EPS, **RELATIVE), 'beit_base_patch16_224',
                     TIMM_VIT, 'Hugging Face BEiT, data2vec', True, 'data2vec_vision'),
    'distilled DeiT': Case('DeiTForImageClassificationWithTeacher', dict(VIT, **EPS),
                           'deit_tiny_distilled_patch16_224', TIMM_VIT, 'Hugging Face ViT, MAE, DINOv2', False, 'deit'),
    'SigLIP': Case('SiglipVisionModel', VIT, 'vit_base_patch16_siglip_224', dict(TIMM_VIT, act_layer='gelu_tanh'),
                   'Hugging Face SigLIP', True),
    'SigLIP without pooling': Case('SiglipVisionModel', VIT, 'vit_base_patch16_siglip_gap_224',
                                   dict(TIMM_VIT, act_layer='gelu_tanh'), 'Hugging Face SigLIP'),
    'InternViT': Case('InternVLVisionModel', dict(VIT, image_size=[32, 32], patch_size=[8, 8], attention_bias=True),
                      'vit_intern300m_patch14_448', TIMM_VIT, 'InternViT'),
    'RegNet': Case('RegNetModel', REGNET, 'regnety_002', {}, 'Hugging Face ResNet, RegNet'),
    'RegNet X': Case('RegNetForImageClassification', dict(REGNET, layer_type='x'), 'regnetx_002', {},
                     'Hugging Face ResNet, RegNet', False, 'regnet'),
    'Swin V2': Case('Swinv2Model', dict(embed_dim=24, depths=[2, 2], num_heads=[2, 4], image_size=64, window_size=8),
                    'swinv2_tiny_window8_256', dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), img_size=64),
                    'Hugging Face Swin', True),
    'PVTv2': Case('PvtV2Model', dict(PYRAMID, num_attention_heads=[1, 2, 5, 8], mlp_ratios=[8, 8, 4, 4], image_size=64,
                                     **EPS), 'pvt_v2_b0', dict(depths=[1, 1, 2, 1], embed_dims=PYRAMID['hidden_sizes']),
                  'Hugging Face PVTv2, Hiera'),
    'Hiera': Case('HieraModel', dict(embed_dim=16, depths=DEPTHS, num_heads=[1, 2, 4, 8], image_size=[64, 64], **EPS),
                  'hiera_tiny_224', dict(embed_dim=16, stages=DEPTHS, img_size=64), 'Hugging Face PVTv2, Hiera', True),
    'AIMv2': Case('Aimv2VisionModel', dict(VIT, intermediate_size=132), 'aimv2_large_patch14_224', TIMM_VIT,
                  'Hugging Face AIMv2'),
    'I-JEPA': Case('IJepaModel', dict(VIT, **EPS), 'vit_tiny_patch16_224', dict(TIMM_VIT, **NO_CLASS),
                   'Hugging Face ViT, MAE, DINOv2'),
    'MSN': Case('ViTMSNModel', dict(VIT, **EPS), 'vit_tiny_patch16_224', TIMM_VIT, 'Hugging Face ViT, MAE, DINOv2'),
}  # fmt: skip


def build(case):
    module = getattr(transformers, case.module)
    return randomize(module(module.config_class(**case.config)))


CASES |= {
    name: CASES['CLIP']._replace(module=module)
    for name, module in (
        ('Chinese CLIP', 'ChineseCLIPVisionModel'),
        ('AltCLIP', 'AltCLIPVisionModel'),
        ('Meta CLIP 2', 'MetaClip2VisionModel'),
    )
}


def size_of(case):
    size = case.config.get('image_size', 64)
    return size[0] if isinstance(size, list) else size


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_a_module_of_transformers_computes_the_same_in_timm(case, tmp_path):
    module = build(case)
    module.save_pretrained(tmp_path)
    model = timm.create_model(case.model, num_classes=3, **case.kwargs)
    report = load_checkpoint(model, tmp_path)
    assert (report.method, report.matched, report.left_over) == (case.method, report.total, ())
    tried = {str(candidate).partition(',')[0] for candidate in candidates(open_checkpoint(tmp_path))}
    assert case.model.replace('_gap', '') in tried or case.model in SEEN_AS_OTHERS
    x = image(size_of(case))
    with torch.no_grad():
        output = (getattr(module, case.part) if case.part else module)(x)
        expected = output.pooler_output if case.pooled else output.last_hidden_state
        if case.method == 'Hugging Face CLIP':  # which normalizes the class token only, and after taking it
            expected = getattr(module, 'vision_model', module).post_layernorm(expected)
    if case.module == 'SwinModel':
        expected = expected.unflatten(1, (7, 7))
    assert largest_difference(model, x, expected, case.pooled) < TOLERANCE

    torch.save(module.state_dict(), tmp_path / 'memory.pth')
    again = timm.create_model(case.model, num_classes=3, **case.kwargs)
    report = load_checkpoint(again, tmp_path / 'memory.pth')
    assert (report.method, report.matched, report.left_over) == (case.method, report.total, ())
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name in report.loaded)


def test_every_case_has_a_row_of_the_docs():
    assert sorted(CASES) == sorted(name for _, _, cases in HUGGING_FACE.values() for name in cases)


def test_a_masked_autoencoder_gives_its_encoder(tmp_path):
    config = transformers.ViTMAEConfig(
        **VIT, **EPS, mask_ratio=0.0, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    )
    module = randomize(transformers.ViTMAEForPreTraining(config))
    module.save_pretrained(tmp_path)
    model = timm.create_model('vit_tiny_patch16_224', **TIMM_VIT)
    assert load_checkpoint(model, str(tmp_path)).matched == len(model.state_dict()) - 2
    with torch.no_grad():
        # nothing masked, and the noise keeps the patches in their order
        expected = module.vit(image(32), noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
    assert largest_difference(model, image(32), expected) < TOLERANCE


def test_a_siglip_model_gives_its_image_tower(tmp_path):
    config = transformers.SiglipConfig(text_config=dict(TEXT, projection_size=48), vision_config=VIT)
    module = randomize(transformers.SiglipModel(config))
    module.save_pretrained(tmp_path)
    model = timm.create_model('vit_base_patch16_siglip_224', num_classes=0, act_layer='gelu_tanh', **TIMM_VIT)
    report = load_checkpoint(model, tmp_path)
    assert (report.copy, report.prefix, report.matched) == ('image tower', 'vision_model.', report.total)
    assert report.data_config['mean'] == (0.5, 0.5, 0.5)
    with torch.no_grad():
        expected = module.vision_model(image(32)).pooler_output
    assert largest_difference(model, image(32), expected, pooled=True) < TOLERANCE


@pytest.mark.parametrize('name', ['vit_base_patch16_siglip_256', 'naflexvit_base_patch16_siglip'])
def test_a_siglip_2_model_of_any_aspect_computes_the_same(name, tmp_path):
    vision = {key: value for key, value in VIT.items() if key != 'image_size'}
    module = randomize(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision, num_patches=16)))
    module.save_pretrained(tmp_path)
    kwargs = dict(TIMM_VIT, act_layer='gelu_tanh')
    if name.startswith('naflex'):
        kwargs = {key: value for key, value in kwargs.items() if key != 'img_size'} | dict(pos_embed_grid_size=(4, 4))
    model = timm.create_model(name, num_classes=0, **kwargs)
    report = load_checkpoint(model, tmp_path)
    assert (report.method, report.matched, report.resized) == ('Hugging Face SigLIP', report.total, ())
    # the image processor of transformers puts the channels of a patch last
    patches = image(32).unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    with torch.no_grad():
        expected = module(patches, torch.ones(2, 16), torch.full((2, 2), 4)).pooler_output
    assert largest_difference(model, image(32), expected, pooled=True) < TOLERANCE


@pytest.mark.parametrize('pool', ['token', 'avg'])
def test_a_beit_that_was_pretrained_on_masked_images_gives_its_encoder(pool, tmp_path):
    config = transformers.BeitConfig(**VIT, **EPS, **SHARED, use_mask_token=True, vocab_size=9)
    module = randomize(transformers.BeitForMaskedImageModeling(config))
    module.save_pretrained(tmp_path)
    model = timm.create_model('beit_base_patch16_224', num_classes=0, global_pool=pool, **TIMM_VIT)
    report = load_checkpoint(model, tmp_path)
    assert report.matched == report.total
    assert any(key.endswith('mask_token') for key in report.dropped)
    with torch.no_grad():
        expected = module.beit(image(32)).last_hidden_state
        expected = module.layernorm(expected) if pool == 'token' else expected
    assert largest_difference(model, image(32), expected) < TOLERANCE
    assert report.missing == (() if pool == 'token' else ('fc_norm.bias', 'fc_norm.weight'))


def test_biases_that_are_zero_need_no_place_in_the_model_and_others_do(tmp_path):
    module = build(CASES['DINOv3'])
    for name, tensor in module.state_dict().items():
        if name.endswith(('q_proj.bias', 'v_proj.bias')):
            tensor.zero_()
    module.save_pretrained(tmp_path)
    model = timm.create_model('vit_small_patch16_dinov3', num_classes=0, **TIMM_VIT)
    load_checkpoint(model, tmp_path)
    x = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))  # rotary positions fit any shape
    with torch.no_grad():
        assert largest_difference(model, x, module(x).last_hidden_state) < TOLERANCE
    build(CASES['DINOv3']).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'blocks\.0\.attn\.q_bias'):
        load_checkpoint(model, tmp_path)


def test_an_internvit_with_the_names_of_its_authors_computes_the_same(tmp_path):
    module = build(CASES['InternViT'])
    tensors = {}
    for key, tensor in module.state_dict().items():
        for new, old in (
            ('embeddings.cls_token', 'embeddings.class_embedding'),
            ('embeddings.position_embeddings', 'embeddings.position_embedding'),
            ('embeddings.patch_embeddings.projection.', 'embeddings.patch_embedding.'),
            ('encoder.layer.', 'encoder.layers.'),
            ('attention.projection_layer.', 'attn.proj.'),
            ('layernorm_before.', 'norm1.'),
            ('layernorm_after.', 'norm2.'),
            ('lambda_', 'ls'),
        ):
            key = key.replace(new, old)
        tensors[f'vision_model.{key}'] = tensor
    for end in ('weight', 'bias'):  # modeling_intern_vit.py of OpenGVLab has one linear layer for the three
        for layer in range(2):
            start = f'vision_model.encoder.layers.{layer}.'
            parts = [tensors.pop(f'{start}attention.{part}_proj.{end}') for part in 'qkv']
            tensors[f'{start}attn.qkv.{end}'] = torch.cat(parts)
    torch.save({**tensors, 'language_model.lm_head.weight': torch.zeros(2, 2)}, tmp_path / 'model.bin')
    model = timm.create_model('vit_intern300m_patch14_448', num_classes=0, **TIMM_VIT)
    report = load_checkpoint(model, tmp_path / 'model.bin')
    assert (report.method, report.copy, report.left_over) == ('InternViT', 'image tower', ())
    with torch.no_grad():
        assert largest_difference(model, image(32), module(image(32)).last_hidden_state) < TOLERANCE


def test_a_network_with_a_part_more_than_the_model_is_refused(tmp_path):
    build(CASES['BEiT']).save_pretrained(tmp_path)
    bare = dict(TIMM_VIT, use_rel_pos_bias=False)
    with pytest.raises(ValueError, match='relative_position_bias_table'):
        load_checkpoint(timm.create_model('beit_base_patch16_224', num_classes=0, **bare), tmp_path)


@pytest.mark.parametrize(
    'name, key, value, message',
    [
        ('RegNet', 'downsample_in_first_stage', False, 'downsample_in_first_stage False'),
        ('DINOv3', 'rope_theta', 50.0, 'rope_theta 50, this model has 100: create it with rope_temperature=50'),
    ],
)
def test_a_key_of_the_config_that_no_shape_tells_is_compared(name, key, value, message, tmp_path):
    case = CASES[name]
    build(case._replace(config={**case.config, key: value})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(timm.create_model(case.model, num_classes=0, **case.kwargs), tmp_path)


@pytest.mark.parametrize('name', ['DINOv3', 'SigLIP', 'distilled DeiT', 'InternViT'])
def test_patches_of_another_size_and_the_size_of_the_images_are_told(name, tmp_path):
    case = CASES[name]
    build(case).save_pretrained(tmp_path)
    model = timm.create_model(case.model, num_classes=0, **{**case.kwargs, 'patch_size': 16})
    report = load_checkpoint(model, tmp_path)
    assert any('patches of 8 px, the model has patches of 16 px' in note for note in report.notes)
    assert 'patch_embed.proj.weight' in report.resized
    assert report.data_config.get('input_size', (3, 32, 32)) == (3, 32, 32)
