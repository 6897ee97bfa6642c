"""Names of EfficientNet-PyTorch and of MobileNetV2, whose blocks are numbered in a row and in timm by stage"""

import re

from .rename import Rename, Tensors, numbered


def without_expansion(tensors: Tensors) -> Tensors:
    """Rename the layers of the blocks that do not widen their input first: timm numbers them without that layer."""
    widening = {match[1] for key in tensors if (match := re.match(r'(blocks\.\d+\.)conv_pw\.', key))}
    names = {'bn2': 'bn1', 'conv_pwl': 'conv_pw', 'bn3': 'bn2'}
    changed = {}
    for key, tensor in tensors.items():
        match = re.match(r'(blocks\.\d+\.)(\w+)(?=\.)', key)
        if match and match[1] not in widening:
            key = match[1] + names.get(match[2], match[2]) + key[match.end() :]
        changed[key] = tensor
    return changed


_AROUND_BLOCKS = (  # of a MobileNetV2
    (r'^features\.0\.0\.', 'conv_stem.'), (r'^features\.0\.1\.', 'bn1.'),
    (r'^features\.(\d+)\.conv\.', numbered('blocks.', '.', -1)),
    (r'^features\.\d+\.0\.', 'conv_head.'), (r'^features\.\d+\.1\.', 'bn2.'),
    (r'^classifier\.1\.', 'classifier.'),
)  # fmt: skip

RENAMES = (
    Rename('torchvision MobileNetV2', r'features\.1\.conv\.0\.0\.', (
        *_AROUND_BLOCKS,
        (r'^blocks\.0\.0\.0\.', 'blocks.0.conv_dw.'), (r'^blocks\.0\.0\.1\.', 'blocks.0.bn1.'),
        (r'^blocks\.0\.1\.', 'blocks.0.conv_pw.'), (r'^blocks\.0\.2\.', 'blocks.0.bn2.'),
        (r'^(blocks\.\d+)\.0\.0\.', r'\1.conv_pw.'), (r'^(blocks\.\d+)\.0\.1\.', r'\1.bn1.'),
        (r'^(blocks\.\d+)\.1\.0\.', r'\1.conv_dw.'), (r'^(blocks\.\d+)\.1\.1\.', r'\1.bn2.'),
        (r'^(blocks\.\d+)\.2\.', r'\1.conv_pwl.'), (r'^(blocks\.\d+)\.3\.', r'\1.bn3.'),
    ), in_stages=True),
    Rename('MobileNetV2, layers in a row', r'features\.1\.conv\.0\.weight$', (  # as torchvision had it at first
        *_AROUND_BLOCKS,
        (r'^blocks\.0\.0\.', 'blocks.0.conv_dw.'), (r'^blocks\.0\.1\.', 'blocks.0.bn1.'),
        (r'^blocks\.0\.3\.', 'blocks.0.conv_pw.'), (r'^blocks\.0\.4\.', 'blocks.0.bn2.'),
        (r'^(blocks\.\d+)\.0\.', r'\1.conv_pw.'), (r'^(blocks\.\d+)\.1\.', r'\1.bn1.'),
        (r'^(blocks\.\d+)\.3\.', r'\1.conv_dw.'), (r'^(blocks\.\d+)\.4\.', r'\1.bn2.'),
        (r'^(blocks\.\d+)\.6\.', r'\1.conv_pwl.'), (r'^(blocks\.\d+)\.7\.', r'\1.bn3.'),
    ), in_stages=True),
    Rename('EfficientNet-PyTorch', r'_conv_stem\.', (
        (r'^_conv_stem\.', 'conv_stem.'), (r'^_bn0\.', 'bn1.'),
        (r'^_conv_head\.', 'conv_head.'), (r'^_bn1\.', 'bn2.'), (r'^_fc\.', 'classifier.'),
        (r'^_blocks\.', 'blocks.'),
        (r'\._expand_conv\.', '.conv_pw.'), (r'\._depthwise_conv\.', '.conv_dw.'),
        (r'\._project_conv\.', '.conv_pwl.'),
        (r'\._bn(\d)\.', numbered('.bn', '.')),
        (r'\._se_(reduce|expand)\.', r'.se.conv_\1.'),
    ), (without_expansion,), in_stages=True, from_tensorflow=True),
)  # fmt: skip
