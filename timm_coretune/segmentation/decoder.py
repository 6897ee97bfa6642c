"""Decoders: segmentation heads without their last layer, from feature maps to features of pixels"""

from collections import OrderedDict
from typing import List, Literal, Tuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.segmentation.deeplabv3 import ASPPPooling, DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork

Head = Literal['deeplabv3', 'fcn', 'fpn', 'linear', 'eomt']
HEADS = get_args(Head)
_PYRAMID_CHANNELS = 256


class _BatchNormOfOne(nn.BatchNorm2d):
    """BatchNorm that normalizes a single value per channel by the running statistics, even in training.

    A batch of one image has one value per channel after global pooling. torch raises an error for it, as one value has
    no variance.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class SingleMapDecoder(nn.Sequential):
    """Layers that take the coarsest feature map alone."""

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        return super().forward(maps[-1])


class PyramidDecoder(nn.Module):
    """A feature pyramid, followed by layers on its finest map.

    Args:
        channels: Channels of the feature maps of the backbone, from fine to coarse.
        layers: Layers on the finest map of the pyramid.
    """

    def __init__(self, channels: List[int], layers: List[nn.Module]):
        super().__init__()
        self.fpn = FeaturePyramidNetwork(channels, _PYRAMID_CHANNELS)
        # the outputs of the coarser maps are not used, and a parameter that gets no gradient stalls
        # DistributedDataParallel
        for block in self.fpn.layer_blocks[1:]:
            block.requires_grad_(False)
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        pyramid = self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))
        return self.layers(pyramid['0'])


def create_decoder(
    head: str,
    channels: List[int],
    reductions: List[int],
    num_classes: int,
) -> Tuple[nn.Module, nn.Conv2d]:
    """Create a head as two modules: a decoder and a classifier.

    Args:
        head: One of HEADS except 'eomt', which is made for a backbone.
        channels: Channels of the feature maps, from fine to coarse.
        reductions: Side of the image divided by the side of the map, for each map.
        num_classes: Number of classes.

    Returns:
        The decoder, from feature maps to features (B, D, h, w), and the 1 x 1 convolution from features to logits.
    """
    if head == 'fpn':
        *layers, classifier = FCNHead(_PYRAMID_CHANNELS, num_classes)
        return PyramidDecoder(channels, layers), classifier
    if head == 'linear':
        return SingleMapDecoder(_BatchNormOfOne(channels[-1])), nn.Conv2d(channels[-1], num_classes, 1)
    if head == 'fcn':
        *layers, classifier = FCNHead(channels[-1], num_classes)
        return SingleMapDecoder(*layers), classifier
    # the dilation rates of the paper for maps of 1/8 and of 1/16, https://arxiv.org/abs/1706.05587
    rates = (12, 24, 36) if reductions[-1] <= 8 else (6, 12, 18)
    *layers, classifier = DeepLabHead(channels[-1], num_classes, rates)
    for pooling in (m for m in layers[0].modules() if isinstance(m, ASPPPooling)):
        norm = pooling[2]
        pooling[2] = _BatchNormOfOne(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    return SingleMapDecoder(*layers), classifier
