"""A timm backbone with a segmentation head"""

import os
from typing import List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..checkpoint import load_checkpoint
from ..timm_model import group_matcher, no_weight_decay
from .decoder import HEADS, create_decoder
from .feature_maps import FeatureMaps, compute_maps, find_maps, freeze_unused, resize_backbone


class SegmentationModel(nn.Module):
    """Classifies every pixel of an image.

    The backbone stays the timm model it was, with its keys behind `backbone.`.

    Args:
        backbone: A timm model.
        maps: Which of its feature maps are taken.
        head: Name of the head.
        decoder: Makes features of the maps (B, D, h, w).
        classifier: 1 x 1 convolution of these features to logits.
        img_size: Height and width of the images that it is trained on.
    """

    def __init__(
        self,
        backbone: nn.Module,
        maps: FeatureMaps,
        head: str,
        decoder: nn.Module,
        classifier: nn.Conv2d,
        img_size: Tuple[int, int],
    ):
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.classifier = classifier
        self.maps = maps
        self.head = head
        self.img_size = img_size
        self.num_classes = classifier.out_channels
        self.num_features = classifier.in_channels

    @property
    def pretrained_cfg(self):
        return self.backbone.pretrained_cfg

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg) -> None:  # as load_checkpoint does
        self.backbone.pretrained_cfg = cfg

    def get_classifier(self) -> Tuple[nn.Module, nn.Module]:
        """What is new and may be trained before the backbone is."""
        return self.decoder, self.classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self):
        return no_weight_decay(self.backbone, 'backbone.')

    def group_matcher(self, coarse: bool = False):
        return group_matcher(self.backbone, 'backbone.', coarse=coarse, own_layer=True)

    def pad(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """x (..., H, W) padded at the bottom and right to what the backbone can halve often enough."""
        multiple = self.maps.reductions[-1]
        height, width = x.shape[-2:]
        bottom, right = -height % multiple, -width % multiple
        return F.pad(x, (0, right, 0, bottom), value=value) if bottom or right else x

    def forward_features(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Feature maps of padded images, from fine to coarse."""
        return compute_maps(self.backbone, x, self.maps)

    def forward_head(self, maps: List[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        """Logits (B, C, h, w), or the features of the pixels before the classifier (B, D, h, w)."""
        features = self.decoder(maps)
        return features if pre_logits else self.classifier(features)

    def forward_pixels(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What there is of a pixel: pre-logits and logits of the feature map, and logits of the image.

        Args:
            x: Images of any height and width that the backbone takes (B, 3, H, W).

        Returns:
            Features (B, D, h, w) and logits (B, C, h, w) of the padded images, logits of the images (B, C, H, W).
        """
        padded = self.pad(x)
        features = self.forward_head(self.forward_features(padded), pre_logits=True)
        logits = self.classifier(features)
        output = F.interpolate(logits, size=padded.shape[-2:], mode='bilinear', align_corners=False)
        return features, logits, output[..., : x.shape[-2], : x.shape[-1]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of every pixel (B, C, H, W) of images (B, 3, H, W)."""
        return self.forward_pixels(x)[2]


def create_segmentation_model(
    backbone: Union[str, nn.Module],
    num_classes: int,
    head: Optional[str] = None,
    img_size: Optional[Tuple[int, int]] = None,
    checkpoint: Optional[Union[str, os.PathLike]] = None,
    **backbone_kwargs,
) -> SegmentationModel:
    """Put a segmentation head of torchvision on a timm backbone.

    A convolutional network is best made with `output_stride=8` or 16, where it takes that, for DeepLab-V3. Without it
    its maps are joined in a pyramid. Plain transformers have one map, whose patches decide on its size.

    Args:
        backbone: A timm model, with its weights loaded or not, or the name to create it by.
        num_classes: Classes of a pixel, background included.
        head: deeplabv3 or fcn on the last map, or fpn on a pyramid of maps. When None fpn where the last map is
            coarser than 1/16 and there are finer ones, deeplabv3 elsewhere.
        img_size: Height and width of the images, to which position embeddings are resized. When None that of the
            backbone.
        checkpoint: A self-supervised checkpoint of the backbone, anything that `load_checkpoint` takes.
        **backbone_kwargs: Arguments of timm.create_model, such as output_stride=8, where backbone is a name.

    Returns:
        The model; parameters of the backbone that its maps do not depend on are frozen.

    Raises:
        ValueError: The backbone makes no feature maps of that size, or an argument is out of range.
    """
    if head is not None and head not in HEADS:
        raise ValueError(f'Expected a head among {", ".join(HEADS)}, got {head!r}.')
    if num_classes < 1:
        raise ValueError(f'Expected num_classes >= 1, got {num_classes}.')
    if isinstance(backbone, str):
        backbone = timm.create_model(backbone, num_classes=0, **backbone_kwargs)
    elif backbone_kwargs:
        raise ValueError(f'Arguments of timm.create_model need the name of a backbone: {sorted(backbone_kwargs)}.')
    if checkpoint is not None:
        load_checkpoint(backbone, checkpoint)
    img_size = resize_backbone(backbone, img_size)
    maps = find_maps(backbone, img_size, pyramid=None if head is None else head == 'fpn')
    if head is None:
        head = 'deeplabv3' if len(maps.indices) == 1 else 'fpn'
    freeze_unused(backbone, maps, img_size)
    decoder, classifier = create_decoder(head, maps.channels, maps.reductions, num_classes)
    return SegmentationModel(backbone, maps, head, decoder, classifier, img_size)
