"""Libraries whose own files tests/checkpoint/test_libraries.py loads, for the table of the docs: copy, architectures"""

LIGHTLY = ('SimCLR', 'MoCo', 'BYOL', 'SwAV', 'SimSiam', 'Barlow Twins', 'DINO')
LIBRARIES = {
    'Hugging Face ResNet': ('encoder', ('ResNet',)),
    'Hugging Face ViT, ViT-MAE, DINOv2, DINOv2 with registers': ('encoder', ('ViT',)),
    'Hugging Face ConvNeXt': ('encoder', ('ConvNeXt',)),
    'Hugging Face Swin': ('encoder', ('Swin',)),
    'Hugging Face CLIP': ('image tower', ('ViT',)),
    **{f'lightly {m}': ('teacher' if m == 'DINO' else 'online encoder', ('ResNet',)) for m in LIGHTLY},
    'open_clip': ('image tower', ('ViT',)),
    'open_clip with a timm tower': ('image tower', ('ViT', 'ConvNeXt')),
    'torchvision': ('encoder', ('ResNet',)),
}
