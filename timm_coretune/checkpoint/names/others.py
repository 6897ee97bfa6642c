"""Names of libraries that write files of several architectures, and of the code of single papers"""

from .rename import Rename, share_table

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
    Rename('BEiT, shared table', r'rel_pos_bias\.relative_position_bias_table$', (), (share_table,)),
    Rename('InternViT', r'encoder\.layers\.\d+\.ls1$', (
        (r'^embeddings\.class_embedding$', 'cls_token'),
        (r'^embeddings\.position_embedding$', 'pos_embed'),
        (r'^embeddings\.patch_embedding\.', 'patch_embed.proj.'),
        (r'^encoder\.layers\.', 'blocks.'),
        (r'\.ls(\d)$', r'.ls\1.gamma'),
    )),
)  # fmt: skip
