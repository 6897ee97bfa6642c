"""Files of transformers: the timm model computes what the original module computes, to 1e-5

Each module is read as the folder that `save_pretrained` writes, whose names are those of version 4 and of the Hub, and
as a state dict that torch saves, whose names are those of version 5 in memory.
"""

from typing import Any, Dict, NamedTuple

import pytest
import timm
import torch
from library_outputs import TOLERANCE, image, largest_difference, randomize

from timm_coretune import load_checkpoint

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
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
RELATIVE, SHARED = dict(use_relative_position_bias=True), dict(use_shared_relative_position_bias=True)
NO_CLASS = dict(class_token=False, global_pool='avg', fc_norm=False)

CASES = {
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
    'I-JEPA': Case('IJepaModel', dict(VIT, **EPS), 'vit_tiny_patch16_224', dict(TIMM_VIT, **NO_CLASS),
                   'Hugging Face ViT, MAE, DINOv2'),
    'MSN': Case('ViTMSNModel', dict(VIT, **EPS), 'vit_tiny_patch16_224', TIMM_VIT, 'Hugging Face ViT, MAE, DINOv2'),
}  # fmt: skip


def build(case):
    module = getattr(transformers, case.module)
    return randomize(module(module.config_class(**case.config)))


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_a_module_of_transformers_computes_the_same_in_timm(case, tmp_path):
    module = build(case)
    module.save_pretrained(tmp_path)
    model = timm.create_model(case.model, num_classes=3, **case.kwargs)
    report = load_checkpoint(model, tmp_path)
    assert (report.method, report.matched, report.left_over) == (case.method, report.total, ())
    size = {'RegNet': 64, 'Swinv2': 64, 'ConvNext': 64}
    x = image(next((n for name, n in size.items() if name in case.module), 32))
    with torch.no_grad():
        output = (getattr(module, case.part) if case.part else module)(x)
    expected = output.pooler_output if case.pooled else output.last_hidden_state
    assert largest_difference(model, x, expected, case.pooled) < TOLERANCE

    torch.save(module.state_dict(), tmp_path / 'memory.pth')
    again = timm.create_model(case.model, num_classes=3, **case.kwargs)
    report = load_checkpoint(again, tmp_path / 'memory.pth')
    assert (report.method, report.matched, report.left_over) == (case.method, report.total, ())
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name in report.loaded)
