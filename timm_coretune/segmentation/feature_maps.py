"""The feature maps of a timm model: which there are, which are used, and which of its parameters make them"""

import contextlib
from typing import Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn


class FeatureMaps(NamedTuple):
    """Which feature maps are taken from a backbone.

    Attributes:
        indices: Their places among the maps of `forward_intermediates`, from fine to coarse.
        norm: Apply the backbone's last norm, which belongs to the output of a plain transformer.
        channels: Channels of each.
        reductions: Pixels of the image to one of the map, along a side.
    """

    indices: List[int]
    norm: bool
    channels: List[int]
    reductions: List[int]


def compute_maps(backbone: nn.Module, x: torch.Tensor, maps: FeatureMaps) -> List[torch.Tensor]:
    """Feature maps (B, C, h, w) of images x (B, 3, H, W)."""
    options = dict(output_fmt='NCHW', intermediates_only=True)
    return backbone.forward_intermediates(x, indices=maps.indices, norm=maps.norm, **options)


def resize_backbone(backbone: nn.Module, img_size: Optional[Tuple[int, int]]) -> Tuple[int, int]:
    """Make a backbone with position embeddings, or windows, take images of a size; returns the size it is to take."""
    config = getattr(backbone, 'pretrained_cfg', None) or {}
    if img_size is None:
        embedding = getattr(backbone, 'patch_embed', None)
        return tuple(getattr(embedding, 'img_size', None) or (config.get('input_size') or (3, 224, 224))[1:])
    if hasattr(backbone, 'set_input_size'):
        backbone.set_input_size(img_size=tuple(img_size))
    return tuple(img_size)


def find_maps(backbone: nn.Module, img_size: Tuple[int, int], pyramid: Optional[bool]) -> FeatureMaps:
    """Choose among the maps that a backbone makes of an image of that size, as they are, not as it describes them.

    Args:
        backbone: A timm model.
        img_size: Height and width of the image.
        pyramid: Take the last map of every size from a quarter of the image's on; otherwise the last map alone. When
            None the former only where the last map is coarser than 1/16.

    Raises:
        ValueError: The backbone makes no feature maps, or not of that size.
    """
    if not hasattr(backbone, 'forward_intermediates'):
        raise ValueError(
            f'Expected a timm model with forward_intermediates, which gives feature maps, {type(backbone).__name__} '
            'has none. Choose another model.'
        )
    try:
        with _probing(backbone, img_size) as image, torch.no_grad():
            found = backbone.forward_intermediates(image, output_fmt='NCHW', intermediates_only=True)
    except (AssertionError, RuntimeError) as e:
        raise ValueError(
            f'Expected a {type(backbone).__name__} that takes images of {img_size[0]} x {img_size[1]}: {e} Create it '
            'with img_size=..., dynamic_img_size=True or strict_img_size=False (--model-kwargs), where it takes these, '
            'or choose another --img-size.'
        ) from e
    reductions = [-(-img_size[0] // found_map.shape[2]) for found_map in found]
    is_plain = len({found_map.shape[2:] for found_map in found}) == 1
    last = len(found) - 1
    if pyramid is None:
        pyramid = reductions[last] > 16 and not is_plain
    indices = [last]
    if pyramid:
        coarse_enough = [i for i in range(last + 1) if reductions[i] >= 4]
        indices = [i for i in coarse_enough if i == last or found[i].shape[2:] != found[i + 1].shape[2:]]
    return FeatureMaps(
        indices,
        is_plain,
        [found[i].shape[1] for i in indices],
        [reductions[i] for i in indices],
    )


@contextlib.contextmanager
def _probing(backbone: nn.Module, img_size: Tuple[int, int]) -> Iterator[torch.Tensor]:
    """An empty image for a backbone, which is in evaluation mode meanwhile."""
    convolution = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    in_chans = 3 if convolution is None else convolution.in_channels
    parameter = next(backbone.parameters())
    was_training = backbone.training
    backbone.eval()
    try:
        yield torch.zeros(1, in_chans, *img_size, device=parameter.device, dtype=parameter.dtype)
    finally:
        backbone.train(was_training)


def freeze_unused(backbone: nn.Module, maps: FeatureMaps, img_size: Tuple[int, int]) -> None:
    """Let only what makes the maps train.

    A layer behind the last map, such as the wide convolution of an EfficientNet, gets no gradient, which
    DistributedDataParallel takes for an error. It stays in the weights of the timm model.
    """
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    if not parameters:
        return
    with _probing(backbone, img_size) as image, torch.enable_grad():
        total = sum(m.float().sum() for m in compute_maps(backbone, image, maps))
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.requires_grad_(gradient is not None)
