"""A timm backbone with a segmentation head"""

import os
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Union, cast

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..checkpoint import load_checkpoint
from ..timm_model import group_matcher, no_weight_decay
from .decoder import HEADS, create_decoder
from .eomt import MaskClassifier, MaskDecoder, append_queries, check_plain_transformer
from .feature_maps import FeatureMaps, compute_maps, find_maps, freeze_unused, missing, padded_size, resize_backbone


class SegmentationModel(nn.Module):
    """Classifies every pixel of an image.

    The backbone stays an unchanged timm model. In the state dict its keys are those of timm, after `backbone.`.

    Args:
        backbone: A timm model.
        maps: The feature maps of the backbone that the decoder uses.
        head: Name of the head, one of HEADS.
        decoder: Turns the feature maps into features of pixels (B, D, h, w).
        classifier: 1 x 1 convolution from the features to logits, or a MaskClassifier.
        img_size: Height and width of the images that the model is trained on.

    Attributes:
        data_config: Mean, std and interpolation of the training. Only `load_segmentation_model` sets it.
        class_names: Names of the classes by index, None if not known. Only `load_segmentation_model` sets it.
    """

    backbone: nn.Module
    decoder: nn.Module
    classifier: Union[nn.Conv2d, MaskClassifier]
    data_config: Dict[str, Any]
    class_names: Optional[List[str]]

    def __init__(
        self,
        backbone: nn.Module,
        maps: FeatureMaps,
        head: str,
        decoder: nn.Module,
        classifier: Union[nn.Conv2d, MaskClassifier],
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
    def pretrained_cfg(self) -> Dict[str, Any]:
        return cast(Dict[str, Any], self.backbone.pretrained_cfg)

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: Dict[str, Any]) -> None:  # load_checkpoint sets it
        self.backbone.pretrained_cfg = cfg  # type: ignore[assignment]  # nn.Module declares tensors and modules only

    def get_classifier(self) -> Tuple[nn.Module, nn.Module]:
        """Decoder and classifier. They are new, and may be trained for some epochs while the backbone is frozen."""
        return self.decoder, self.classifier

    @property
    def feature_classifiers(self) -> List[nn.Module]:
        """The part of `get_classifier` that maps features to logits."""
        return [self.classifier]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        cast(Any, self.backbone).set_grad_checkpointing(enable)  # a method of timm's that nn.Module does not declare

    def no_weight_decay(self) -> Set[str]:
        return no_weight_decay(self.backbone, 'backbone.')

    def group_matcher(self, coarse: bool = False) -> Union[Dict, Callable[[str], int]]:
        return group_matcher(self.backbone, 'backbone.', coarse=coarse, own_layer=True)

    def pad(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Pad x (..., H, W) at the bottom and at the right, to a multiple of the reduction of the coarsest map."""
        multiple = self.maps.reductions[-1]
        height, width = x.shape[-2:]
        bottom, right = missing(height, multiple), missing(width, multiple)
        return F.pad(x, (0, right, 0, bottom), value=value) if bottom or right else x

    def forward_features(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Compute the feature maps of padded images (B, 3, H, W), from fine to coarse."""
        return compute_maps(self.backbone, x, self.maps)

    def forward_head(self, maps: List[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        """Compute logits (B, C, h, w) from feature maps, or with pre_logits=True features (B, D, h, w)."""
        features = self.decoder(maps)
        return features if pre_logits else self.classify(features, maps)

    def classify(self, features: torch.Tensor, maps: List[torch.Tensor]) -> torch.Tensor:
        """Compute logits (B, C, h, w) from the features of pixels and the feature maps that they are made of."""
        return self.classifier(features)

    def forward_pixels(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute pre-logits features and logits at the resolution of the decoder, and logits of the image pixels.

        Args:
            x: Images of any height and width that the backbone takes (B, 3, H, W).

        Returns:
            Features (B, D, h, w) of the padded images, their logits (B, C, h, w), and the logits of every pixel of the
            images without padding (B, C, H, W).
        """
        padded = self.pad(x)
        maps = self.forward_features(padded)
        features = self.forward_head(maps, pre_logits=True)
        logits = self.classify(features, maps)
        output = F.interpolate(logits, size=padded.shape[-2:], mode='bilinear', align_corners=False)
        return features, logits, output[..., : x.shape[-2], : x.shape[-1]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of every pixel (B, C, H, W) of images (B, 3, H, W)."""
        return self.forward_pixels(x)[2]


class MaskTransformer(SegmentationModel):
    """A SegmentationModel whose 'feature maps' are the map of patches, and the queries of EoMT."""

    decoder: MaskDecoder
    classifier: MaskClassifier

    @property
    def feature_classifiers(self) -> List[nn.Module]:
        """Empty: a mixture of pixels of two images has no queries, so its logits are mixed from those of the pixels."""
        return []

    def forward_features(self, x: torch.Tensor) -> List[torch.Tensor]:
        return append_queries(self.backbone, x, self.decoder.queries, self.decoder.num_blocks)

    def classify(self, features: torch.Tensor, maps: List[torch.Tensor]) -> torch.Tensor:
        return self.classifier(features, maps[1])


def build_model(
    backbone: nn.Module, maps: FeatureMaps, head: str, num_classes: int, img_size: Tuple[int, int]
) -> SegmentationModel:
    """Put a head on feature maps of a backbone that were chosen."""
    if head == 'eomt':
        decoder = MaskDecoder(maps.channels[-1], maps.reductions[-1], len(cast(nn.Sequential, backbone.blocks)))
        mask_classifier = MaskClassifier(maps.channels[-1], num_classes)
        return MaskTransformer(backbone, maps, head, decoder, mask_classifier, img_size)
    return SegmentationModel(
        backbone, maps, head, *create_decoder(head, maps.channels, maps.reductions, num_classes), img_size
    )


def create_segmentation_model(
    backbone: Union[str, nn.Module],
    num_classes: int,
    head: Optional[str] = None,
    img_size: Optional[Tuple[int, int]] = None,
    checkpoint: Optional[Union[str, os.PathLike]] = None,
    **backbone_kwargs: Any,
) -> SegmentationModel:
    """Put a segmentation head on a timm backbone.

    Create a convolutional network with `output_stride=8` or 16 if it takes this argument: its last feature map is then
    fine enough for DeepLab-V3. Otherwise its feature maps are joined in a pyramid. A plain transformer has feature maps
    of one size, which its patch size determines.

    Args:
        backbone: A timm model, with or without trained weights, or the name of one to create.
        num_classes: Number of classes, including the background.
        head: Name of the head: `deeplabv3`, `fcn` or `linear` on the last feature map, `fpn` on a pyramid, or `eomt`
            with queries among the tokens of a plain transformer. When None `fpn` if the last map is coarser than 1/16
            and there are finer ones, otherwise `deeplabv3`.
        img_size: Height and width of the images. Position embeddings are resized to it. When None the image size of the
            backbone.
        checkpoint: A self-supervised checkpoint to load into the backbone, anything that `load_checkpoint` takes.
        **backbone_kwargs: Arguments of timm.create_model, such as output_stride=8. Only if backbone is a name.

    Returns:
        The model. Parameters of the backbone that its feature maps do not depend on are frozen.

    Raises:
        ValueError: The backbone makes no feature maps of images of this size, or an argument is out of range.
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
    if head == 'eomt':
        check_plain_transformer(backbone)
    img_size = resize_backbone(backbone, img_size)
    maps = find_maps(backbone, img_size, pyramid=None if head is None else head == 'fpn')
    if head is None:
        head = 'deeplabv3' if len(maps.indices) == 1 else 'fpn'
    model = build_model(backbone, maps, head, num_classes, img_size)
    freeze_unused(backbone, model.forward_features, padded_size(img_size, maps.reductions[-1]))
    return model
