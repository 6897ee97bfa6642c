"""Rename the tensors of a backbone from the names of other libraries to those of timm

Each row of a table describes the names of one library. If timm's `checkpoint_filter_fn` reads the original names of an
architecture, the row leads to the original names and the filter does the rest.
"""

import re
from typing import Dict, NamedTuple, Tuple

import torch


class Rename(NamedTuple):
    """How one library names the tensors of one architecture.

    Attributes:
        name: Name of the row, for the report.
        marker: Regular expression for a key that only such a state dict has.
        steps: Regular expressions with their replacements. All are applied to each key, in this order.
    """

    name: str
    marker: str
    steps: Tuple[Tuple[str, str], ...]


_HF_TRANSFORMER = (  # names inside a block that ViT, DINOv2 and Swin of the transformers library share
    (r'\.attention\.attention\.(query|key|value)\.', r'.attn.\1.'),
    (r'\.attention\.self\.(query|key|value)\.', r'.attn.\1.'),
    (r'\.attention\.output\.dense\.', '.attn.proj.'),
    (r'\.attention\.self\.relative_position_bias_table', '.attn.relative_position_bias_table'),
    (r'\.attention\.self\.relative_position_index', '.attn.relative_position_index'),
    (r'\.intermediate\.dense\.', '.mlp.fc1.'),
    (r'\.output\.dense\.', '.mlp.fc2.'),
    (r'\.layernorm_before\.', '.norm1.'),
    (r'\.layernorm_after\.', '.norm2.'),
    (r'\.layer_scale(\d)\.lambda1', r'.ls\1.gamma'),
    (r'^layernorm\.', 'norm.'),
    (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
)

RENAMES = (
    Rename('torchvision layers by position', r'4\.0\.conv1\.', (
        (r'^0\.', 'conv1.'), (r'^1\.', 'bn1.'), (r'^4\.', 'layer1.'), (r'^5\.', 'layer2.'), (r'^6\.', 'layer3.'),
        (r'^7\.', 'layer4.'),
    )),
    Rename('blocks in chunks', r'blocks\.\d+\.\d+\.', ((r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.'),)),
    Rename('CLIP image tower', r'(class_embedding$|attnpool\.)', ((r'^', 'visual.'),)),
    Rename('mmpretrain ViT', r'layers\.0\.ln1\.', (
        (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'^layers\.(\d+)\.ln(\d)\.', r'blocks.\1.norm\2.'),
        (r'^layers\.(\d+)\.ffn\.layers\.0\.0\.', r'blocks.\1.mlp.fc1.'),
        (r'^layers\.(\d+)\.ffn\.layers\.1\.', r'blocks.\1.mlp.fc2.'),
        (r'^layers\.', 'blocks.'),
        (r'^ln1\.', 'norm.'),
    )),
    Rename('mmpretrain ConvNeXt', r'stages\.0\.0\.depthwise_conv\.', (
        (r'\.depthwise_conv\.', '.dwconv.'), (r'\.pointwise_conv', '.pwconv'), (r'^norm3\.', 'norm.'),
    )),
    Rename('transformers ResNet', r'embedder\.embedder\.', (
        (r'^embedder\.embedder\.convolution\.', 'conv1.'),
        (r'^embedder\.embedder\.normalization\.', 'bn1.'),
        (r'\.shortcut\.convolution\.', '.downsample.0.'),
        (r'\.shortcut\.normalization\.', '.downsample.1.'),
        (r'\.layer\.0\.convolution\.', '.conv1.'), (r'\.layer\.0\.normalization\.', '.bn1.'),
        (r'\.layer\.1\.convolution\.', '.conv2.'), (r'\.layer\.1\.normalization\.', '.bn2.'),
        (r'\.layer\.2\.convolution\.', '.conv3.'), (r'\.layer\.2\.normalization\.', '.bn3.'),
        (r'^encoder\.stages\.0\.layers\.', 'layer1.'), (r'^encoder\.stages\.1\.layers\.', 'layer2.'),
        (r'^encoder\.stages\.2\.layers\.', 'layer3.'), (r'^encoder\.stages\.3\.layers\.', 'layer4.'),
        (r'^classifier\.1\.', 'fc.'),
    )),
    Rename('transformers ViT', r'encoder\.layer\.\d+\.attention\.', (
        (r'^encoder\.layer\.', 'blocks.'),
        *_HF_TRANSFORMER,
        (r'\.mlp\.weights_in\.', '.mlp.w12.'), (r'\.mlp\.weights_out\.', '.mlp.w3.'),
        (r'^embeddings\.position_embeddings$', 'pos_embed'),
        (r'^embeddings\.(cls_token|register_tokens|mask_token)$', r'\1'),
    )),
    Rename('transformers ConvNeXt', r'encoder\.stages\.\d+\.layers\.\d+\.dwconv\.', (
        (r'^embeddings\.patch_embeddings\.', 'stem.0.'), (r'^embeddings\.layernorm\.', 'stem.1.'),
        (r'^encoder\.stages\.(\d+)\.layers\.', r'stages.\1.blocks.'),
        (r'^encoder\.stages\.(\d+)\.downsampling_layer\.', r'stages.\1.downsample.'),
        (r'\.dwconv\.', '.conv_dw.'), (r'\.layernorm\.', '.norm.'), (r'\.pwconv(\d)\.', r'.mlp.fc\1.'),
        (r'\.layer_scale_parameter$', '.gamma'),
        (r'^layernorm\.', 'head.norm.'),
    )),
    Rename('transformers Swin', r'encoder\.layers\.\d+\.blocks\.\d+\.attention\.', (
        *_HF_TRANSFORMER,
        (r'^embeddings\.norm\.', 'patch_embed.norm.'),
        (r'^encoder\.layers\.', 'layers.'),
    )),
    Rename('transformers CLIP', r'pre_layrnorm\.', (
        (r'^embeddings\.class_embedding$', 'cls_token'),
        (r'^embeddings\.patch_embedding\.', 'patch_embed.proj.'),
        (r'^embeddings\.position_embedding\.weight$', 'pos_embed'),
        (r'^pre_layrnorm\.', 'norm_pre.'), (r'^post_layernorm\.', 'norm.'),
        (r'^encoder\.layers\.', 'blocks.'),
        (r'\.self_attn\.out_proj\.', '.attn.proj.'),
        (r'\.self_attn\.q_proj\.', '.attn.query.'), (r'\.self_attn\.k_proj\.', '.attn.key.'),
        (r'\.self_attn\.v_proj\.', '.attn.value.'),
        (r'\.layer_norm(\d)\.', r'.norm\1.'),
    )),
)  # fmt: skip

_SPLIT = re.compile(r'^(.*\.attn\.)query\.(weight|bias)$')


def fuse(parts: Tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Create a placeholder for the concatenation of tensors.

    The placeholder is a tensor without memory (on the meta device) that keeps the tensors as its attribute `parts`.
    They are concatenated only when they are copied into the model, so the file is not copied into memory before.
    """
    fused = torch.empty((sum(p.shape[0] for p in parts), *parts[0].shape[1:]), dtype=parts[0].dtype, device='meta')
    fused.parts = parts  # type: ignore[attr-defined]  # torch allows further attributes, its types do not list them
    return fused


def apply_rename(rename: Rename, tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Rename all keys, and fuse query, key and value into the one tensor that timm has for them."""
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in rename.steps:
            key = re.sub(pattern, replacement, key)
        # timm resizes position embeddings with a batch dimension, which those of CLIP lack
        renamed[key] = value[None] if key == 'pos_embed' and value.ndim == 2 else value
    for key in [k for k in renamed if _SPLIT.match(k)]:
        parts = [key, key.replace('.query.', '.key.'), key.replace('.query.', '.value.')]
        if all(p in renamed and renamed[p].shape[1:] == renamed[key].shape[1:] for p in parts):
            renamed[_SPLIT.sub(r'\1qkv.\2', key)] = fuse(tuple(renamed.pop(p) for p in parts))
    return renamed


def renames_for(tensors: Dict[str, torch.Tensor]) -> Tuple[Rename, ...]:
    """Renames whose marker matches one of the keys."""
    keys = '\n'.join(tensors)
    return tuple(r for r in RENAMES if re.search(f'^({r.marker})', keys, re.MULTILINE))
