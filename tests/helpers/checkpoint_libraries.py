"""Libraries whose own files the tests of checkpoints load, for the table of the docs: copy, architectures

Of transformers also the cases of tests/checkpoint/test_transformers.py that a row stands for.
"""

LIGHTLY = ('SimCLR', 'MoCo', 'BYOL', 'SwAV', 'SimSiam', 'Barlow Twins', 'DINO')
HUGGING_FACE = {
    'ResNet': ('encoder', 'ResNet', ('ResNet-18', 'ResNet-50')),
    'RegNet (SEER)': ('encoder', 'others', ('RegNet', 'RegNet X')),
    'ViT, ViT-MAE, MSN, I-JEPA': ('encoder', 'ViT', ('ViT', 'MSN', 'I-JEPA')),
    'DeiT with distillation token': ('encoder', 'ViT', ('distilled DeiT',)),
    'DINOv2, DINOv2 with registers': ('encoder', 'ViT', ('DINOv2', 'DINOv2 gated', 'DINOv2 with registers')),
    'DINOv3': ('teacher', 'ViT', ('DINOv3', 'DINOv3 gated')),
    'DINOv3 ConvNeXt': ('teacher', 'ConvNeXt', ('DINOv3 ConvNeXt',)),
    'BEiT': ('encoder', 'ViT', ('BEiT', 'BEiT for classification', 'BEiT, table of all blocks',
                                'BEiT, table of all blocks in both')),
    'data2vec-vision': ('encoder', 'ViT', ('data2vec',)),
    'ConvNeXt': ('encoder', 'ConvNeXt', ('ConvNeXt',)),
    'ConvNeXtV2': ('encoder', 'ConvNeXt', ('ConvNeXtV2',)),
    'Swin': ('encoder', 'Swin', ('Swin',)),
    'Swin V2': ('encoder', 'Swin', ('Swin V2',)),
    'CLIP, also Chinese, Alt, Meta CLIP 2': ('image tower', 'ViT', ('CLIP', 'CLIP with GELU', 'Chinese CLIP',
                                                                  'AltCLIP', 'Meta CLIP 2')),
    'SigLIP, SigLIP 2, SigLIP 2 of any aspect (naflex)': ('image tower', 'ViT', ('SigLIP', 'SigLIP without pooling')),
    'InternViT': ('image tower', 'ViT', ('InternViT',)),
    'AIMv2': ('image tower', 'ViT', ('AIMv2',)),
    'PVTv2': ('encoder', 'others', ('PVTv2',)),
    'Hiera': ('encoder', 'others', ('Hiera',)),
}  # fmt: skip
LIBRARIES = {
    **{f'Hugging Face {name}': (copy, (architecture,)) for name, (copy, architecture, _) in HUGGING_FACE.items()},
    'InternViT, names of its authors': ('image tower', ('ViT',)),
    **{f'lightly {m}': ('teacher' if m == 'DINO' else 'online encoder', ('ResNet',)) for m in LIGHTLY},
    'open_clip': ('image tower', ('ViT',)),
    'open_clip with a timm tower': ('image tower', ('ViT', 'ConvNeXt')),
    'torchvision': ('encoder', ('ResNet', 'ViT', 'ConvNeXt', 'Swin')),
    'torchvision MobileNetV2, also with layers in a row': ('encoder', ('others',)),
    'EfficientNet-PyTorch': ('encoder', ('others',)),
    'torchvision Swin V2': ('encoder', ('Swin',)),
    'torchvision RegNet': ('encoder', ('others',)),
    'VISSL RegNet (SEER)': ('trunk', ('others',)),
}
