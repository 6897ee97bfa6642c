"""Files as the code bases of self-supervised methods write them, around the tensors of real timm models

Where a library installs from the registries, tests/checkpoint/test_libraries.py takes its own files instead. These here
follow the save calls and key lists of the sources that are named in the rows of timm_coretune/checkpoint/rules.py.
"""

import argparse
import functools
import re
from typing import Any, Callable, Dict, NamedTuple, Tuple

import timm
import torch

StateDict = Dict[str, torch.Tensor]

RESNET, RESNET50, VIT, CONVNEXT = 'resnet18', 'resnet50', 'vit_tiny_patch16_224', 'convnext_atto'
SWIN = 'swin_tiny_patch4_window7_224'
SMALL = {  # arguments that make an architecture small enough to write dozens of files of it
    SWIN: dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), img_size=56, window_size=7),
    'vit_small_patch16_224': dict(num_heads=12, depth=2),
    'vit_small_patch14_dinov2': dict(depth=4, embed_dim=48, num_heads=3, img_size=56),
    'vit_small_patch14_reg4_dinov2': dict(depth=4, embed_dim=48, num_heads=3, img_size=56),
    'vit_small_patch16_dinov3_qkvb': dict(depth=2, embed_dim=64, num_heads=2, img_size=64),
    'vit_base_patch16_gap_224': dict(depth=2, embed_dim=48, num_heads=3, img_size=64),
    'vit_base_patch32_clip_quickgelu_224': dict(depth=2, embed_dim=64, num_heads=2, img_size=64),
    'vit_base_patch32_clip_224': dict(depth=2, embed_dim=64, num_heads=2, img_size=64),
    'convnext_tiny': dict(dims=(16, 24, 32, 40), depths=(2, 2, 2, 2)),
}


def create(architecture: str, num_classes: int = 0) -> torch.nn.Module:
    return timm.create_model(architecture, num_classes=num_classes, **SMALL.get(architecture, {}))


@functools.cache
def weights(architecture: str, seed: int = 0) -> StateDict:
    """Random values for all tensors of a headless model, so that a default initialisation cannot pass for them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else torch.full_like(v, 7 + seed)
        for k, v in create(architecture).state_dict().items()
    }


def put(prefix: str, state_dict: StateDict) -> StateDict:
    return {prefix + key: value for key, value in state_dict.items()}


def sub(state_dict: StateDict, *steps: Tuple[str, str]) -> StateDict:
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in steps:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def mlp(prefix: str) -> StateDict:
    return {f'{prefix}.0.weight': torch.zeros(8, 16), f'{prefix}.2.bias': torch.zeros(8)}


ARGS = argparse.Namespace(arch='resnet18', lr=0.03)


def moco(b, o):
    queue = {'module.queue': torch.zeros(8, 16), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)}
    q, k = ({**put(f'module.encoder_{c}.', x), **mlp(f'module.encoder_{c}.fc')} for c, x in (('q', b), ('k', o)))
    return {'epoch': 200, 'arch': 'resnet50', 'state_dict': {**q, **k, **queue}, 'optimizer': {'state': {}}}


def moco_v3(b, o):
    head = 'fc' if 'conv1.weight' in b else 'head'
    base = {**put('module.base_encoder.', b), **mlp(f'module.base_encoder.{head}')}
    return {'state_dict': {**base, **put('module.momentum_encoder.', o), **mlp('module.predictor')}}


def simsiam(b, o):
    return {'state_dict': {**put('module.encoder.', b), **mlp('module.encoder.fc'), **mlp('module.predictor')}}


def plain(b, o):
    return dict(b)


def barlow_resume(b, o):
    bn = {'module.bn.running_mean': torch.zeros(8), 'module.bn.running_var': torch.ones(8)}
    return {'epoch': 9, 'model': {**put('module.backbone.', b), **mlp('module.projector'), **bn}, 'optimizer': {}}


def swav(b, o):
    return {**put('module.', b), **mlp('module.projection_head'), 'module.prototypes.weight': torch.zeros(4, 8)}


def dino(b, o):
    student = put('module.backbone.', o)
    teacher = {**put('backbone.', b), **mlp('head')}
    return {'student': student, 'teacher': teacher, 'args': ARGS, 'dino_loss': {'center': torch.zeros(1, 8)}}


def ibot(b, o):
    content = dino(b, o)
    content['teacher']['backbone.masked_embed'] = torch.zeros(1, 8)
    return content


def ibot_released(b, o):
    return {'state_dict': {**b, 'masked_embed': torch.zeros(1, 8)}}


def official_swin(b):
    moved = sub(b, (r'layers\.1\.downsample', 'layers.0.down_'), (r'layers\.2\.downsample', 'layers.1.down_'),
                (r'layers\.3\.downsample', 'layers.2.down_'), (r'down_', 'downsample'))  # fmt: skip
    tables = {k: v for k, v in b.items() if k.endswith('bias_table')}
    index = {k.replace('bias_table', 'index'): torch.zeros(49, 49, dtype=torch.long) for k in tables}
    return {**moved, **index}


def esvit(b, o):
    teacher = {**official_swin(b), **mlp('head'), **mlp('head_dense')}
    return {'student': put('module.', official_swin(o)), 'teacher': teacher, 'args': ARGS}


def ibot_swin(b, o):
    return ibot(official_swin(b), official_swin(o))


def dinov2(b, o):
    return {**b, 'mask_token': torch.zeros(1, b['norm.weight'].numel())}


def dinov2_reg(b, o):
    position, token = b['pos_embed'], b['cls_token']
    pos_embed = torch.cat([torch.zeros_like(token), position], 1)
    out = {k: v for k, v in b.items() if k not in ('reg_token', 'pos_embed')}
    return {**out, 'pos_embed': pos_embed, 'register_tokens': b['reg_token'], 'mask_token': torch.zeros(1, 48)}


def dinov2_training(b, o):
    chunked = {re.sub(r'^blocks\.(\d+)\.', lambda m: f'blocks.{int(m[1]) // 2}.{m[1]}.', k): v for k, v in b.items()}
    return {'teacher': {**put('backbone.', dinov2(chunked, o)), **mlp('dino_head'), **mlp('ibot_head')}}


def dinov2_both(b, o):
    copies = {**put('student.backbone.', dinov2(o, b)), **put('teacher.backbone.', dinov2(b, o))}
    return {'model': {**copies, **mlp('student.dino_head'), **mlp('teacher.dino_head')}, 'iteration': 3}


def dino_module(b, o):
    copies = {**put('student.backbone.', o), **put('teacher.backbone.', b)}
    return {'state_dict': {**copies, **mlp('student.head.last_layer'), **mlp('teacher.head.last_layer')}}


def byol_module(b, o):
    copies = {**put('target_network.', o), **put('online_network.', b)}
    return {'state_dict': {**copies, **mlp('online_predictor')}}


def dinov3(b, o):
    out = {'mask_token': torch.zeros(1, 64), 'rope_embed.periods': torch.zeros(8)}
    for key, value in b.items():
        if key.endswith('q_bias'):
            v = b[key.replace('q_bias', 'v_bias')]
            out[key.replace('q_bias', 'qkv.bias')] = torch.cat([value, torch.zeros_like(value), v])
            out[key.replace('q_bias', 'qkv.bias_mask')] = torch.full((3 * len(value),), float('nan'))
        elif not key.endswith(('v_bias', 'k_bias')):
            key = re.sub(r'gamma_(\d)', r'ls\1.gamma', key).replace('reg_token', 'storage_tokens')
            out[key] = value
    return out


def fb_convnext(b, o):
    out = sub(
        b,
        (r'^stem\.', 'downsample_layers.0.'),
        (r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
        (r'\.blocks\.', '.'),
        ('conv_dw', 'dwconv'),
        (r'mlp\.fc', 'pwconv'),
        (r'^head\.norm', 'norm'),
    )
    return {k: v.flatten(1) if 'pwconv' in k and v.ndim == 4 else v for k, v in out.items()}


def dinov3_convnext(b, o):
    return {**fb_convnext(b, o), 'norms.3.weight': torch.zeros(8), 'norms.3.bias': torch.zeros(8)}


def mae(b, o):
    decoder = {'decoder_embed.weight': torch.zeros(8, 8), 'decoder_blocks.0.norm1.weight': torch.zeros(8)}
    return {'model': {**b, **decoder, 'mask_token': torch.zeros(1, 1, 8)}, 'args': ARGS, 'epoch': 3}


def mae_gap(b, o):
    return mae(sub(b, (r'^fc_norm\.', 'norm.')), o)


def ijepa(b, o):
    return {'encoder': put('module.', o), 'target_encoder': put('module.', b), 'predictor': put('module.', mlp('x'))}


def vissl(b, o):
    trunk = put('_feature_blocks.', b)
    return {'classy_state_dict': {'base_model': {'model': {'trunk': trunk, 'heads': mlp('0')}}}, 'phase_idx': 3}


def vissl_dino(b, o):
    content = vissl(o, o)
    content['classy_state_dict']['base_model']['model']['trunk'] = dict(o)
    content['classy_state_dict']['loss'] = put('momentum_teacher.module.trunk.', b)
    return content


def solo_learn(b, o):
    heads = {**mlp('projector'), **mlp('classifier'), **mlp('momentum_projector')}
    return {'state_dict': {**put('momentum_backbone.', o), **put('backbone.', b), **heads}, 'epoch': 1}


def by_position(b):
    return sub(b, (r'^conv1\.', '0.'), (r'^bn1\.', '1.'), (r'^layer1\.', '4.'), (r'^layer2\.', '5.'),
               (r'^layer3\.', '6.'), (r'^layer4\.', '7.'))  # fmt: skip


def lightly_moco(b, o):
    b, o = by_position(b), by_position(o)
    return {'state_dict': {**put('backbone_momentum.', o), **put('backbone.', b), **mlp('projection_head.layers')}}


def lightly_dino(b, o):
    b, o = by_position(b), by_position(o)
    return {**put('student_backbone.', o), **put('teacher_backbone.', b), **mlp('teacher_head.layers')}


def lightly_train(b, o):
    part = 'embedding_model.wrapped_model._model.'
    return {'state_dict': {**put(f'student_{part}', o), **put(f'teacher_{part}', b), **mlp('teacher_head')}}


def densecl(b, o):
    return {'state_dict': {**put('backbone.', b), **put('encoder_q.0.', b), **put('encoder_k.0.', o), **mlp('queue2')},
            'meta': {'epoch': 3}}  # fmt: skip


def mm_byol(b, o):
    copies = {**put('backbone.', b), **put('online_net.0.', b), **put('target_net.module.0.', o)}
    return {'state_dict': {**copies, **mlp('neck')}, 'meta': {}}


def mm_moco(b, o):
    return {'state_dict': {**put('backbone.', b), **put('encoder_k.module.0.', o), **mlp('neck')}, 'meta': {}}


def mm_vit(b, o):
    out = sub(b, (r'^patch_embed\.proj\.', 'patch_embed.projection.'), (r'^norm\.', 'ln1.'),
              (r'^blocks\.(\d+)\.norm(\d)\.', r'layers.\1.ln\2.'), (r'^blocks\.', 'layers.'),
              (r'mlp\.fc1', 'ffn.layers.0.0'), (r'mlp\.fc2', 'ffn.layers.1'))  # fmt: skip
    return {'state_dict': {**put('backbone.', out), **mlp('neck')}, 'meta': {}}


def mm_convnext(b, o):
    out = sub(fb_convnext(b, o), ('dwconv', 'depthwise_conv'), ('pwconv', 'pointwise_conv'), (r'^norm\.', 'norm3.'))
    return {'state_dict': {**put('backbone.', out), **mlp('head')}, 'meta': {}}


def pycontrast(b, o):
    return {'opt': ARGS, 'model': {**put('module.encoder.', b), **mlp('module.head')},
            'model_ema': {**put('module.encoder.', o), **mlp('module.head')}, 'contrast': {}}  # fmt: skip


def supcontrast(b, o):
    return {'opt': ARGS, 'model': {**put('encoder.module.', b), **mlp('head')}, 'epoch': 1000}


def pixpro(b, o):
    return {
        'opt': ARGS,
        'model': {**put('module.encoder.', b), **put('module.encoder_k.', o), **mlp('module.projector')},
    }


def sthalles(b, o):
    return {'state_dict': {**put('backbone.', b), **mlp('backbone.fc')}, 'arch': 'resnet18'}


def spijkervet(b, o):
    return {**put('encoder.', b), **mlp('projector')}


def without_counters(b, o):
    return {k: v for k, v in b.items() if not k.endswith('num_batches_tracked')}


def clip_tower(b):
    out = sub(b, (r'^patch_embed\.proj', 'conv1'), (r'^pos_embed', 'positional_embedding'), (r'^norm\.', 'ln_post.'),
              (r'^cls_token', 'class_embedding'), (r'^norm_pre', 'ln_pre'), (r'^blocks\.', 'transformer.resblocks.'),
              (r'\.norm(\d)', r'.ln_\1'), (r'attn\.qkv\.', 'attn.in_proj_'), (r'attn\.proj', 'attn.out_proj'),
              (r'mlp\.fc1', 'mlp.c_fc'), (r'mlp\.fc2', 'mlp.c_proj'))  # fmt: skip
    out = {k: v[0] if k == 'positional_embedding' else v.flatten() if k == 'class_embedding' else v
           for k, v in out.items()}  # fmt: skip
    text = {'transformer.resblocks.0.ln_1.weight': torch.zeros(8), 'logit_scale': torch.ones(())}
    return {**put('visual.', {**out, 'proj': torch.zeros(64, 16)}), **text}


def efficientnet_pytorch(b, o):
    """Names by the order of the layers: the blocks are counted through, and each layer has one name in all of them."""
    number = {place: i for i, place in enumerate(dict.fromkeys(k.split('.')[1] + '.' + k.split('.')[2]
                                                               for k in b if k.startswith('blocks.')))}  # fmt: skip
    around = {'conv_stem': '_conv_stem', 'bn1': '_bn0', 'conv_head': '_conv_head', 'bn2': '_bn1'}
    expanding = {'conv_pw': '_expand_conv', 'bn1': '_bn0', 'conv_dw': '_depthwise_conv', 'bn2': '_bn1',
                 'conv_pwl': '_project_conv', 'bn3': '_bn2'}  # fmt: skip
    plain = {'conv_dw': '_depthwise_conv', 'bn1': '_bn1', 'conv_pw': '_project_conv', 'bn2': '_bn2'}
    out = {'_fc.weight': torch.zeros(8, 16), '_fc.bias': torch.zeros(8)}
    for key, value in b.items():
        parts = key.split('.')
        if parts[0] != 'blocks':
            out['.'.join([around[parts[0]], *parts[1:]])] = value
            continue
        stage, block, layer, *rest = parts[1:]
        if layer == 'se':
            layer, *rest = rest
            name = {'conv_reduce': '_se_reduce', 'conv_expand': '_se_expand'}[layer]
        else:
            name = (expanding if f'blocks.{stage}.{block}.conv_pwl.weight' in b else plain)[layer]
        out['.'.join(['_blocks', str(number[f'{stage}.{block}']), name, *rest])] = value
    return out


def openai_clip(b, o):
    half = {k: v.half() for k, v in clip_tower(b).items()}
    return {**half, 'input_resolution': torch.tensor(64), 'context_length': torch.tensor(77)}


def open_clip(b, o):
    return {'state_dict': put('module.', clip_tower(b)), 'epoch': 3}


def open_clip_timm(b, o):
    return {**put('visual.trunk.', b), 'visual.head.proj.weight': torch.zeros(8, 8), 'logit_bias': torch.zeros(())}


def lightning(b, o):
    return {'state_dict': {**put('model.backbone.', b), **mlp('model.head')}, 'pytorch-lightning_version': '2.5'}


def timm_training(b, o):
    return {'state_dict': dict(o), 'state_dict_ema': dict(b), 'arch': 'resnet18', 'args': ARGS}


def compiled_fsdp(b, o):
    wrapped = sub(b, (r'^(layer\d\.\d)\.', r'\1._fsdp_wrapped_module._checkpoint_wrapped_module.'))
    return {'state_dict': put('_orig_mod.module.encoder_q.', wrapped)}


class Format(NamedTuple):
    """One kind of file.

    Attributes:
        name: Row of the table in the docs.
        method: What the report must call it.
        copy: Which copy it must take.
        content: Backbone and the copy that must not be taken -> what is saved.
        architectures: Models it is tested with.
    """

    name: str
    method: str
    copy: str
    content: Callable[[StateDict, StateDict], Any]
    architectures: Tuple[str, ...]


FORMATS = (
    Format('MoCo v1/v2, PCL', 'MoCo v1/v2, PCL', 'query encoder', moco, (RESNET, RESNET50)),
    Format('MoCo v3', 'MoCo v3', 'base encoder', moco_v3, (RESNET50, 'vit_small_patch16_224')),
    Format('SimSiam', 'SimSiam', 'encoder', simsiam, (RESNET, RESNET50)),
    Format('Barlow Twins, VICReg, as released', 'plain backbone', 'encoder', plain, (RESNET50, CONVNEXT)),
    Format('Barlow Twins, VICReg, training file', 'Barlow Twins, VICReg', 'encoder', barlow_resume, (RESNET50,)),
    Format('SwAV, DeepCluster v2', 'SwAV, DeepCluster v2', 'encoder', swav, (RESNET50,)),
    Format('DINO, training file', 'DINO', 'teacher', dino, (VIT, RESNET)),
    Format('DINO, as released', 'plain backbone', 'encoder', plain, (VIT,)),
    Format('iBOT, training file', 'iBOT', 'teacher', ibot, (VIT,)),
    Format('iBOT, training file of Swin', 'iBOT', 'teacher', ibot_swin, (SWIN,)),
    Format('iBOT, as released', 'iBOT backbone', 'encoder', ibot_released, (VIT,)),
    Format('EsViT', 'EsViT', 'teacher', esvit, (SWIN,)),
    Format('DINOv2, as released', 'DINOv2', 'teacher', dinov2, ('vit_small_patch14_dinov2',)),
    Format('DINOv2 with registers', 'DINOv2', 'teacher', dinov2_reg, ('vit_small_patch14_reg4_dinov2',)),
    Format('DINOv2, training file', 'DINOv2 training', 'teacher', dinov2_training, ('vit_small_patch14_dinov2',)),
    Format('DINOv2, student and teacher in one state dict', 'DINO, iBOT in one state dict', 'teacher', dinov2_both,
           ('vit_small_patch14_dinov2',)),
    Format('DINO, student and teacher in one state dict', 'DINO, iBOT in one state dict', 'teacher', dino_module,
           (VIT,)),
    Format('DINOv3', 'DINOv3', 'teacher', dinov3, ('vit_small_patch16_dinov3_qkvb',)),
    Format('DINOv3 ConvNeXt', 'DINOv3', 'teacher', dinov3_convnext, ('convnext_tiny',)),
    Format('ConvNeXt, original names', 'plain backbone', 'encoder', fb_convnext, (CONVNEXT,)),
    Format('MAE', 'MAE', 'encoder', mae, (VIT,)),
    Format('MAE into a model with average pooling', 'MAE', 'encoder', mae_gap, ('vit_base_patch16_gap_224',)),
    Format('I-JEPA', 'I-JEPA', 'target encoder', ijepa, (VIT,)),
    Format('VISSL', 'VISSL', 'trunk', vissl, (RESNET50,)),
    Format('VISSL DINO', 'VISSL DINO', 'teacher', vissl_dino, (VIT,)),
    Format('solo-learn', 'solo-learn', 'online encoder', solo_learn, (RESNET, VIT)),
    Format('lightly, examples', 'lightly', 'online encoder', lightly_moco, (RESNET,)),
    Format('lightly, DINO example', 'lightly DINO', 'teacher', lightly_dino, (RESNET,)),
    Format('LightlyTrain, state dict', 'LightlyTrain', 'teacher', lightly_train, (VIT, CONVNEXT)),
    Format('OpenSelfSup, DenseCL, mmselfsup', 'OpenSelfSup, DenseCL, mmselfsup', 'query encoder', densecl, (RESNET50,)),
    Format('mmselfsup BYOL', 'BYOL of OpenSelfSup, mmselfsup', 'online encoder', mm_byol, (RESNET,)),
    Format('mmselfsup MoCo', 'OpenSelfSup, DenseCL, mmselfsup', 'query encoder', mm_moco, (RESNET,)),
    Format('mmpretrain ViT', 'mmselfsup, mmpretrain', 'online encoder', mm_vit, (VIT,)),
    Format('mmpretrain ConvNeXt', 'mmselfsup, mmpretrain', 'online encoder', mm_convnext, (CONVNEXT,)),
    Format('PyContrast (MoCo, InfoMin)', 'PyContrast', 'query encoder', pycontrast, (RESNET,)),
    Format('SupContrast, Core-tuning', 'SupContrast, Core-tuning', 'encoder', supcontrast, (RESNET50,)),
    Format('PixPro', 'PixPro', 'online encoder', pixpro, (RESNET,)),
    Format('SimCLR of sthalles', 'SimCLR of sthalles', 'encoder', sthalles, (RESNET,)),
    Format('SimCLR of Spijkervet', 'SimCLR of Spijkervet', 'encoder', spijkervet, (RESNET,)),
    Format('BYOL converted from JAX', 'plain backbone', 'encoder', without_counters, (RESNET50,)),
    Format('EfficientNet-PyTorch', 'EfficientNet-PyTorch', 'encoder', efficientnet_pytorch,
           ('tf_efficientnet_b1', 'tf_efficientnet_lite0')),
    Format('OpenAI CLIP', 'OpenAI CLIP', 'image tower', openai_clip, ('vit_base_patch32_clip_quickgelu_224',)),
    Format('OpenCLIP', 'OpenCLIP', 'image tower', open_clip, ('vit_base_patch32_clip_224',)),
    Format('OpenCLIP with a timm tower', 'OpenCLIP with a timm tower', 'image tower', open_clip_timm, (VIT, CONVNEXT)),
    Format('Lightning module', 'unknown method', 'state_dict/model.backbone', lightning, (RESNET, SWIN)),
    Format('two copies of an unknown method', 'unknown method', 'online encoder', byol_module, (RESNET, VIT)),
    Format('timm train.py', 'timm train.py', 'EMA', timm_training, (RESNET,)),
    Format('any of these, compiled or sharded', 'MoCo v1/v2, PCL', 'query encoder', compiled_fsdp, (RESNET,)),
)  # fmt: skip
CASES = [(fmt, architecture) for fmt in FORMATS for architecture in fmt.architectures]
