"""Names of torchvision, and of ClassyVision and VISSL, from which its RegNets come"""

from .rename import Rename, bias_of_query_and_value, numbered

_BOTTLENECK = (  # names inside a block of a RegNet
    (r'\.f\.a\.0\.', '.conv1.conv.'), (r'\.f\.a\.1\.', '.conv1.bn.'),
    (r'\.f\.b\.0\.', '.conv2.conv.'), (r'\.f\.b\.1\.', '.conv2.bn.'),
    (r'\.f\.se\.(excitation\.0|fc1)\.', '.se.fc1.'), (r'\.f\.se\.(excitation\.2|fc2)\.', '.se.fc2.'),
    (r'\.f\.c\.0\.', '.conv3.conv.'), (r'\.f\.(c\.1|final_bn)\.', '.conv3.bn.'), (r'\.f\.c\.', '.conv3.conv.'),
    (r'\.proj\.1\.', '.downsample.bn.'), (r'\.proj\.(0\.)?', '.downsample.conv.'),
)  # fmt: skip
_SWIN = (
    (r'^features\.0\.0\.', 'patch_embed.proj.'), (r'^features\.0\.2\.', 'patch_embed.norm.'),
    (r'^features\.1\.', 'layers.0.blocks.'), (r'^features\.3\.', 'layers.1.blocks.'),
    (r'^features\.5\.', 'layers.2.blocks.'), (r'^features\.7\.', 'layers.3.blocks.'),
    (r'^features\.2\.', 'layers.1.downsample.'), (r'^features\.4\.', 'layers.2.downsample.'),
    (r'^features\.6\.', 'layers.3.downsample.'),
    (r'\.mlp\.0\.', '.mlp.fc1.'), (r'\.mlp\.3\.', '.mlp.fc2.'),
    (r'^head\.', 'head.fc.'),
)  # fmt: skip

RENAMES = (
    Rename('torchvision ViT', r'encoder\.layers\.encoder_layer_0\.', (
        (r'^conv_proj\.', 'patch_embed.proj.'),
        (r'^class_token$', 'cls_token'), (r'^encoder\.pos_embedding$', 'pos_embed'),
        (r'^encoder\.layers\.encoder_layer_', 'blocks.'),
        (r'\.ln_(\d)\.', r'.norm\1.'),
        (r'\.self_attention\.in_proj_', '.attn.qkv.'), (r'\.self_attention\.out_proj\.', '.attn.proj.'),
        (r'\.mlp\.(0|linear_1)\.', '.mlp.fc1.'), (r'\.mlp\.(3|linear_2)\.', '.mlp.fc2.'),
        (r'^encoder\.ln\.', 'norm.'), (r'^heads\.head\.', 'head.'),
    )),
    Rename('torchvision Swin V2', r'features\.1\.0\.attn\.logit_scale$', _SWIN, (bias_of_query_and_value,)),
    Rename('torchvision Swin', r'features\.1\.0\.attn\.', _SWIN),
    Rename('torchvision ConvNeXt', r'features\.1\.0\.layer_scale$', (
        (r'^features\.0\.', 'stem.'),
        (r'^features\.1\.', 'stages.0.blocks.'), (r'^features\.3\.', 'stages.1.blocks.'),
        (r'^features\.5\.', 'stages.2.blocks.'), (r'^features\.7\.', 'stages.3.blocks.'),
        (r'^features\.2\.', 'stages.1.downsample.'), (r'^features\.4\.', 'stages.2.downsample.'),
        (r'^features\.6\.', 'stages.3.downsample.'),
        (r'\.block\.0\.', '.conv_dw.'), (r'\.block\.2\.', '.norm.'),
        (r'\.block\.3\.', '.mlp.fc1.'), (r'\.block\.5\.', '.mlp.fc2.'), (r'\.layer_scale$', '.gamma'),
        (r'^classifier\.0\.', 'head.norm.'), (r'^classifier\.2\.', 'head.fc.'),
    )),
    Rename('torchvision RegNet', r'trunk_output\.block1\.', (
        (r'^stem\.0\.', 'stem.conv.'), (r'^stem\.1\.', 'stem.bn.'),
        (r'^trunk_output\.block(\d+)\.block\d+-(\d+)\.', numbered(r's\1.b', '.')),
        *_BOTTLENECK,
        (r'^fc\.', 'head.fc.'),
    )),
    Rename('VISSL RegNet', r'res2\.block1-0\.', (
        (r'^conv1\.stem\.0\.', 'stem.conv.'), (r'^conv1\.stem\.1\.', 'stem.bn.'),
        (r'^res\d+\.block(\d+)-(\d+)\.', numbered(r's\1.b', '.')),
        (r'^(s\d+\.b\d+)\.bn\.', r'\1.downsample.bn.'),
        *_BOTTLENECK,
    )),
)  # fmt: skip
