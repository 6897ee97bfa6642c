"""Names of Hugging Face transformers: those of its files, and those that version 5 has in memory

`save_pretrained` writes the names of version 4. A state dict that was saved with torch has the names in memory.
"""

from .rename import (
    Rename,
    as_convolution,
    blocks_in_a_row,
    numbered,
    share_table,
    split_pooling,
    without_zero_biases,
)

_PROJECTIONS = (  # query, key and value are joined later, under these names
    (r'\.attention\.(attention|self)\.(query|key|value)\.', r'.attn.\2.'),
    (r'\.(attention|self_attn)\.q_proj\.', '.attn.query.'),
    (r'\.(attention|self_attn)\.k_proj\.', '.attn.key.'),
    (r'\.(attention|self_attn)\.v_proj\.', '.attn.value.'),
    (r'\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj|attention\.projection_layer)\.',
     '.attn.proj.'),
)  # fmt: skip
_BLOCK = (  # names inside a block that most transformers share
    *_PROJECTIONS,
    (r'\.intermediate\.dense\.', '.mlp.fc1.'),
    (r'\.output\.dense\.', '.mlp.fc2.'),
    (r'\.layernorm_before\.', '.norm1.'),
    (r'\.layernorm_after\.', '.norm2.'),
    (r'\.layer_scale(\d)\.lambda1$', r'.ls\1.gamma'),
    (r'^layernorm\.', 'norm.'),
    (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
)
_TOKENS = (
    (r'^embeddings\.position_embeddings$', 'pos_embed'),
    (r'^embeddings\.distillation_token$', 'dist_token'),
    (r'^embeddings\.(cls_token|register_tokens)$', r'\1'),
)
_CONVNEXT = (
    (r'\.dwconv\.', '.conv_dw.'), (r'\.depthwise_conv\.', '.conv_dw.'),
    (r'\.(layernorm|layer_norm)\.', '.norm.'),
    (r'\.(pwconv|pointwise_conv)(\d)\.', r'.mlp.fc\2.'),
    (r'\.grn\.', '.mlp.grn.'),
    (r'\.layer_scale_parameter$', '.gamma'),
    (r'^(layernorm|layer_norm)\.', 'head.norm.'),
)  # fmt: skip
_BEIT = (
    (r'^(beit|data2vec_vision)\.', ''),
    (r'^(encoder\.layer|layers)\.', 'blocks.'),
    *_BLOCK,
    *_TOKENS,
    (r'\.lambda_(\d)$', r'.gamma_\1'),
    (r'^(encoder\.relative_position_bias|shared_position_bias)\.', 'rel_pos_bias.'),
    (r'\.(attention\.attention\.)?relative_position_bias\.relative_position_bias_table$',
     '.attn.relative_position_bias_table'),
    (r'^pooler\.layernorm\.', 'fc_norm.'),
)  # fmt: skip
_DINOV3 = (
    (r'^(model\.)?layer\.', 'blocks.'),
    *_PROJECTIONS,
    (r'\.layer_scale(\d)\.lambda1$', r'.gamma_\1'),
    (r'\.mlp\.down_proj\.', '.mlp.fc2.'),
    (r'^embeddings\.patch_embeddings\.', 'patch_embed.proj.'),
    (r'^embeddings\.cls_token$', 'cls_token'),
    (r'^embeddings\.register_tokens$', 'reg_token'),
)
_DINOV3_MLP = (*_DINOV3, (r'\.mlp\.up_proj\.', '.mlp.fc1.'))
_DINOV3_GATED = (*_DINOV3, (r'\.mlp\.gate_proj\.', '.mlp.fc1_g.'), (r'\.mlp\.up_proj\.', '.mlp.fc1_x.'))

RENAMES = (
    Rename('transformers ResNet', r'embedder\.embedder\.', (
        (r'^embedder\.embedder\.convolution\.', 'conv1.'),
        (r'^embedder\.embedder\.normalization\.', 'bn1.'),
        (r'\.shortcut\.convolution\.', '.downsample.0.'),
        (r'\.shortcut\.normalization\.', '.downsample.1.'),
        (r'\.layer\.(\d+)\.convolution\.', numbered('.conv', '.')),
        (r'\.layer\.(\d+)\.normalization\.', numbered('.bn', '.')),
        (r'^encoder\.stages\.0\.layers\.', 'layer1.'), (r'^encoder\.stages\.1\.layers\.', 'layer2.'),
        (r'^encoder\.stages\.2\.layers\.', 'layer3.'), (r'^encoder\.stages\.3\.layers\.', 'layer4.'),
        (r'^classifier\.1\.', 'fc.'),
    )),
    Rename('transformers RegNet', r'embedder\.embedder\.', (
        (r'^embedder\.embedder\.convolution\.', 'stem.conv.'),
        (r'^embedder\.embedder\.normalization\.', 'stem.bn.'),
        (r'^encoder\.stages\.(\d+)\.layers\.(\d+)\.', numbered(r'stages.\1.b', '.')),
        (r'^stages\.(\d+)\.', numbered('s', '.')),
        (r'\.shortcut\.convolution\.', '.downsample.conv.'),
        (r'\.shortcut\.normalization\.', '.downsample.bn.'),
        (r'\.layer\.2\.attention\.0\.', '.se.fc1.'), (r'\.layer\.2\.attention\.2\.', '.se.fc2.'),
        (r'\.layer\.3\.', '.layer.2.'),  # the third convolution, which follows squeeze and excitation if there is one
        (r'\.layer\.(\d+)\.convolution\.', numbered('.conv', '.conv.')),
        (r'\.layer\.(\d+)\.normalization\.', numbered('.conv', '.bn.')),
    )),
    Rename('transformers ViT', r'(encoder\.layer\.\d+\.attention\.|layers\.\d+\.attention\.[qo]_proj\.)', (
        (r'^(encoder\.layer|layers)\.', 'blocks.'),
        *_BLOCK,
        *_TOKENS,
        (r'\.mlp\.weights_in\.', '.mlp.w12.'), (r'\.mlp\.(weights_out|down_proj)\.', '.mlp.w3.'),
        (r'^embeddings\.mask_token$', 'mask_token'),  # by which timm's filter knows DINOv2
    )),
    Rename('transformers BEiT', r'.*\.lambda_1$', _BEIT),
    Rename('transformers BEiT, shared table', r'(.*\.)?(shared_position_bias|encoder\.relative_position_bias)\.',
           _BEIT, (share_table,)),
    Rename('transformers InternViT', r'encoder\.layer\.\d+\.attention\.projection_layer\.', (
        (r'^encoder\.layer\.', 'blocks.'), *_BLOCK, *_TOKENS, (r'\.lambda_(\d)$', r'.ls\1.gamma'),
    )),
    Rename('transformers DINOv3', r'(model\.)?layer\.\d+\.mlp\.up_proj\.', _DINOV3_MLP, (without_zero_biases,)),
    Rename('transformers DINOv3, biases', r'(model\.)?layer\.\d+\.mlp\.up_proj\.', _DINOV3_MLP),
    Rename('transformers DINOv3, gated', r'(model\.)?layer\.\d+\.mlp\.gate_proj\.', _DINOV3_GATED,
           (without_zero_biases,)),
    Rename('transformers DINOv3, gated, biases', r'(model\.)?layer\.\d+\.mlp\.gate_proj\.', _DINOV3_GATED),
    Rename('transformers ConvNeXt', r'encoder\.stages\.\d+\.layers\.\d+\.dwconv\.', (
        (r'^embeddings\.patch_embeddings\.', 'stem.0.'), (r'^embeddings\.layernorm\.', 'stem.1.'),
        (r'^encoder\.stages\.(\d+)\.layers\.', r'stages.\1.blocks.'),
        (r'^encoder\.stages\.(\d+)\.downsampling_layer\.', r'stages.\1.downsample.'),
        *_CONVNEXT,
    )),
    Rename('transformers DINOv3 ConvNeXt', r'(model\.)?stages\.\d+\.layers\.\d+\.depthwise_conv\.', (
        (r'^(model\.)?stages\.0\.downsample_layers\.', 'stem.'),
        (r'^(model\.)?stages\.(\d+)\.downsample_layers\.', r'stages.\2.downsample.'),
        (r'^(model\.)?stages\.(\d+)\.layers\.', r'stages.\2.blocks.'),
        *_CONVNEXT,
    )),
    Rename('transformers Swin', r'encoder\.layers\.\d+\.blocks\.\d+\.attention\.', (
        *_BLOCK,
        (r'\.attention\.(self|relative_position_bias)\.relative_position_(bias_table|index)$',
         r'.attn.relative_position_\2'),
        (r'\.attention\.self\.logit_scale$', '.attn.logit_scale'),
        (r'\.attention\.self\.continuous_position_bias_mlp\.', '.attn.cpb_mlp.'),
        (r'^embeddings\.norm\.', 'patch_embed.norm.'),
        (r'^encoder\.layers\.', 'layers.'),
    )),
    Rename('transformers CLIP', r'(pre_layrnorm\.|encoder\.layers\.\d+\.self_attn\.)', (
        (r'^embeddings\.class_embedding$', 'cls_token'),
        (r'^embeddings\.patch_embedding\.', 'patch_embed.proj.'),
        (r'^embeddings\.position_embedding\.weight$', 'pos_embed'),
        (r'^pre_layrnorm\.', 'norm_pre.'), (r'^post_layernorm\.', 'norm.'),
        (r'^encoder\.layers\.', 'blocks.'),
        *_PROJECTIONS,
        (r'\.layer_norm(\d)\.', r'.norm\1.'),
        (r'^head\.probe$', 'attn_pool.latent'),
        (r'^head\.attention\.in_proj_', 'attn_pool.in_proj_'),
        (r'^head\.attention\.out_proj\.', 'attn_pool.proj.'),
        (r'^head\.layernorm\.', 'attn_pool.norm.'), (r'^head\.mlp\.', 'attn_pool.mlp.'),
    ), (split_pooling, as_convolution)),
    Rename('transformers AIMv2', r'encoder\.layers\.\d+\.rms_norm1\.', (
        (r'^embeddings\.patch_embed\.', 'patch_embed.proj.'), (r'^embeddings\.rms_norm\.', 'patch_embed.norm.'),
        (r'^embeddings\.position_embedding\.weight$', 'pos_embed'),
        (r'^encoder\.layers\.', 'blocks.'),
        *_PROJECTIONS,
        (r'\.attention\.out_proj\.', '.attn.proj.'),
        (r'\.ffn\.gate_proj\.', '.mlp.fc1_g.'), (r'\.ffn\.up_proj\.', '.mlp.fc1_x.'),
        (r'\.ffn\.down_proj\.', '.mlp.fc2.'),
        (r'\.rms_norm(\d)\.', r'.norm\1.'), (r'^rms_norm\.', 'norm.'),
    )),
    Rename('transformers PVTv2', r'encoder\.layers\.\d+\.patch_embedding\.', (
        (r'^encoder\.layers\.0\.patch_embedding\.', 'patch_embed.'),
        (r'^encoder\.layers\.(\d+)\.patch_embedding\.', r'stages.\1.downsample.'),
        (r'^encoder\.layers\.', 'stages.'),
        (r'\.attention\.query\.', '.attn.q.'), (r'\.attention\.(key|value|proj)\.', r'.attn.\1.'),
        (r'\.attention\.spatial_reduction\.', '.attn.sr.'), (r'\.attention\.layer_norm\.', '.attn.norm.'),
        (r'\.layer_norm_(\d)\.', r'.norm\1.'), (r'\.layer_norm\.', '.norm.'),
        (r'\.mlp\.dense(\d)\.', r'.mlp.fc\1.'), (r'\.dwconv\.dwconv\.', '.dwconv.'),
    )),
    Rename('transformers Hiera', r'encoder\.stages\.\d+\.layers\.\d+\.attn\.', (
        (r'^embeddings\.position_embeddings$', 'pos_embed'),
        (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
        (r'^encoder\.stages\.', 'stages.'),
        (r'\.layernorm_before\.', '.norm1.'), (r'\.layernorm_after\.', '.norm2.'),
        (r'^pooler\.layernorm\.', 'head.norm.'),
    ), (blocks_in_a_row,)),
)  # fmt: skip
