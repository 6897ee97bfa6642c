"""Feature maps of a timm model: choose those for a segmentation head, compute them, freeze unused parameters"""

import contextlib
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn


class FeatureMaps(NamedTuple):
    """The feature maps of a backbone that a segmentation head uses.

    Attributes:
        indices: Indices of the maps among all maps of `forward_intermediates`, from fine to coarse.
        norm: Whether to apply the last norm of the backbone. It is part of the output of a plain transformer.
        channels: Number of channels of each map.
        reductions: Height of the image divided by the height of the map, for each map.
    """

    indices: List[int]
    norm: bool
    channels: List[int]
    reductions: List[int]


def compute_maps(backbone: nn.Module, x: torch.Tensor, maps: FeatureMaps) -> List[torch.Tensor]:
    """Compute the chosen feature maps (B, C, h, w) of images x (B, 3, H, W)."""
    forward_intermediates: Any = backbone.forward_intermediates  # a method of timm's that nn.Module does not declare
    return forward_intermediates(x, indices=maps.indices, norm=maps.norm, output_fmt='NCHW', intermediates_only=True)


def resize_backbone(backbone: nn.Module, img_size: Optional[Tuple[int, int]]) -> Tuple[int, int]:
    """Adapt a backbone to images of another size, if it has position embeddings or windows of a fixed size.

    Args:
        backbone: A timm model. It is changed in place.
        img_size: Height and width of the images. When None the backbone keeps its own.

    Returns:
        Height and width of the images that the backbone takes.
    """
    if img_size is None:
        config = getattr(backbone, 'pretrained_cfg', None) or {}
        embedding = getattr(backbone, 'patch_embed', None)
        height, width = getattr(embedding, 'img_size', None) or (config.get('input_size') or (3, 224, 224))[1:]
        return height, width
    height, width = img_size
    set_input_size: Optional[Callable[..., None]] = getattr(backbone, 'set_input_size', None)
    if set_input_size is not None:
        set_input_size(img_size=(height, width))
    return height, width


def find_maps(backbone: nn.Module, img_size: Tuple[int, int], pyramid: Optional[bool]) -> FeatureMaps:
    """Choose the feature maps for a segmentation head, by their actual sizes for an image.

    The sizes are measured. Those that a timm model gives in its `feature_info` are not exact for every image size.

    Args:
        backbone: A timm model.
        img_size: Height and width of the image.
        pyramid: If True, take a pyramid: of every size, from 1/4 of the image on, the last map. If False, take the last
            map alone. When None, take a pyramid if the last map is coarser than 1/16 and there are finer ones.

    Raises:
        ValueError: The backbone makes no feature maps, or does not take images of this size.
    """
    forward_intermediates: Optional[Callable[..., List[torch.Tensor]]]
    forward_intermediates = getattr(backbone, 'forward_intermediates', None)
    if forward_intermediates is None:
        raise ValueError(
            f'Expected a timm model with forward_intermediates, which gives feature maps, {type(backbone).__name__} '
            'has none. Choose another model.'
        )
    try:
        with _probing(backbone, img_size) as image, torch.no_grad():
            found = forward_intermediates(image, output_fmt='NCHW', intermediates_only=True)
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
    """Give an image of zeros (1, C, H, W) to try a backbone with. Meanwhile the backbone is in evaluation mode."""
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
    """Freeze the parameters of a backbone that the chosen feature maps do not depend on.

    An example is the wide convolution after the last feature map of an EfficientNet. A parameter that gets no gradient
    stalls DistributedDataParallel. Frozen parameters stay in the state dict, so that plain timm loads it.
    """
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    if not parameters:
        return
    with _probing(backbone, img_size) as image, torch.enable_grad():
        total = torch.stack([m.float().sum() for m in compute_maps(backbone, image, maps)]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.requires_grad_(gradient is not None)
