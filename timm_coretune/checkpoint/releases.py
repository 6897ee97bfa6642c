"""Short names of well-known public checkpoints

URLs, licences and papers as their publishers state them in the file named in each row. The licence is the publisher's
and binds whoever uses the weights: some forbid commercial use.
"""

from typing import Dict, NamedTuple


class Release(NamedTuple):
    """One published file.

    Attributes:
        url: Where it is.
        model: timm model that it fits.
        licence: Of the weights.
        paper: arXiv number.
        source: Where URL and licence are stated.
    """

    url: str
    model: str
    licence: str
    paper: str
    source: str


_FB = 'https://dl.fbaipublicfiles.com/'
_NC = 'CC-BY-NC-4.0'
_APACHE = 'Apache-2.0'

RELEASES: Dict[str, Release] = {
    'mocov1_resnet50': Release(_FB + 'moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar',
                               'resnet50', _NC, '1911.05722', 'facebookresearch/moco README.md'),
    'mocov2_resnet50': Release(_FB + 'moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar',
                               'resnet50', _NC, '2003.04297', 'facebookresearch/moco README.md'),
    'mocov2_resnet50_200ep': Release(_FB + 'moco/moco_checkpoints/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar',
                                     'resnet50', _NC, '2003.04297', 'facebookresearch/moco README.md'),
    'mocov3_resnet50': Release(_FB + 'moco-v3/r-50-1000ep/r-50-1000ep.pth.tar',
                               'resnet50', _NC, '2104.02057', 'facebookresearch/moco-v3 CONFIG.md, README.md'),
    'mocov3_vits16': Release(_FB + 'moco-v3/vit-s-300ep/vit-s-300ep.pth.tar', 'vit_small_patch16_224, num_heads=12',
                             _NC, '2104.02057', 'facebookresearch/moco-v3 CONFIG.md, README.md'),
    'mocov3_vitb16': Release(_FB + 'moco-v3/vit-b-300ep/vit-b-300ep.pth.tar', 'vit_base_patch16_224',
                             _NC, '2104.02057', 'facebookresearch/moco-v3 CONFIG.md, README.md'),
    'simsiam_resnet50': Release(_FB + 'simsiam/models/100ep/pretrain/checkpoint_0099.pth.tar',
                                'resnet50', _NC, '2011.10566', 'facebookresearch/simsiam README.md'),
    'swav_resnet50': Release(_FB + 'deepcluster/swav_800ep_pretrain.pth.tar',
                             'resnet50', _NC, '2006.09882', 'facebookresearch/swav README.md, LICENSE'),
    'deepclusterv2_resnet50': Release(_FB + 'deepcluster/deepclusterv2_800ep_pretrain.pth.tar',
                                      'resnet50', _NC, '2006.09882', 'facebookresearch/swav README.md, LICENSE'),
    'barlowtwins_resnet50': Release(
        _FB + 'barlowtwins/epochs1000_bs2048_lr0.2_lambd0.0051_proj_8192_8192_8192_scale0.024/resnet50.pth',
        'resnet50', _NC, '2103.03230', 'facebookresearch/barlowtwins README.md'),
    'vicreg_resnet50': Release(_FB + 'vicreg/resnet50.pth',
                               'resnet50', 'MIT', '2105.04906', 'facebookresearch/vicreg README.md'),
    'dino_resnet50': Release(_FB + 'dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth',
                             'resnet50', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vits16': Release(_FB + 'dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth',
                           'vit_small_patch16_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vits8': Release(_FB + 'dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth',
                          'vit_small_patch8_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vitb16': Release(_FB + 'dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth',
                           'vit_base_patch16_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'dino_vitb8': Release(_FB + 'dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth',
                          'vit_base_patch8_224', _APACHE, '2104.14294', 'facebookresearch/dino hubconf.py'),
    'mae_vitb16': Release(_FB + 'mae/pretrain/mae_pretrain_vit_base.pth',
                          'vit_base_patch16_224', _NC, '2111.06377', 'facebookresearch/mae README.md'),
    'mae_vitl16': Release(_FB + 'mae/pretrain/mae_pretrain_vit_large.pth',
                          'vit_large_patch16_224', _NC, '2111.06377', 'facebookresearch/mae README.md'),
    'dinov2_vits14': Release(_FB + 'dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth',
                             'vit_small_patch14_dinov2', _APACHE, '2304.07193', 'facebookresearch/dinov2 README.md'),
    'dinov2_vits14_reg': Release(_FB + 'dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth',
                                 'vit_small_patch14_reg4_dinov2', _APACHE, '2309.16588',
                                 'facebookresearch/dinov2 README.md'),
    'dinov2_vitb14': Release(_FB + 'dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth',
                             'vit_base_patch14_dinov2', _APACHE, '2304.07193', 'facebookresearch/dinov2 README.md'),
    'dinov2_vitb14_reg': Release(_FB + 'dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth',
                                 'vit_base_patch14_reg4_dinov2', _APACHE, '2309.16588',
                                 'facebookresearch/dinov2 README.md'),
}  # fmt: skip
