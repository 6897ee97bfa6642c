"""Feature maps of a timm model: choose those for a segmentation head, compute them, freeze unused parameters"""

import contextlib
import math
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

Shape = Tuple[int, int, int]  # channels, height and width of a feature map


class FeatureMaps(NamedTuple):
    """The feature maps of a backbone that a segmentation head uses.

    Attributes:
        indices: Indices of the maps among all maps of `forward_intermediates`, from fine to coarse.
        norm: Whether to apply the last norm of the backbone. It is part of the output of a plain transformer.
        channels: Number of channels of each map.
        reductions: Height of the padded image divided by the height of the map, for each map.
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
    if not hasattr(backbone, 'forward_intermediates'):
        raise ValueError(
            f'Expected a timm model with forward_intermediates, which gives feature maps, {type(backbone).__name__} '
            'has none. Choose another model.'
        )
    found, reductions = _find_reductions(backbone, img_size)
    is_plain = len({shape[1:] for shape in found}) == 1
    last = len(found) - 1
    if pyramid is None:
        pyramid = reductions[last] > 16 and not is_plain
    indices = [last]
    if pyramid:
        coarse_enough = [i for i in range(last + 1) if reductions[i] >= 4]
        indices = [i for i in coarse_enough if i == last or found[i][1:] != found[i + 1][1:]]
    return FeatureMaps(
        indices,
        is_plain,
        [found[i][0] for i in indices],
        [reductions[i] for i in indices],
    )


def padded_size(img_size: Tuple[int, int], multiple: int) -> Tuple[int, int]:
    """The smallest height and width that are multiples of a number and not below those of an image."""
    height, width = img_size
    return height + missing(height, multiple), width + missing(width, multiple)


def missing(length: int, multiple: int) -> int:
    """What a length lacks to the next multiple.

    With `-length % multiple` a compiled model fails at its second size, as torch.compile cannot negate lengths there.
    """
    return (multiple - length % multiple) % multiple


def _find_reductions(backbone: nn.Module, img_size: Tuple[int, int]) -> Tuple[List[Shape], List[int]]:
    """Measure all feature maps, and the side of the image divided by the side of each.

    A backbone rounds the sides of its maps up or down where they do not divide those of the image, so that the sides do
    not tell the reductions. Then images are measured as they are padded later, to a multiple of the coarsest reduction.
    """
    nominal = _nominal_reductions(backbone)
    failure: Optional[ValueError] = None
    try:
        found = _measure(backbone, img_size)
    except ValueError as e:
        failure, found = e, []
    exact = _divide(img_size, found)
    if exact and (exact == nominal or all(r & (r - 1) == 0 for r in exact)):
        return found, exact
    guessed = 2 ** round(math.log2(img_size[0] / found[-1][1])) if found else 32
    refused = 0
    for multiple in dict.fromkeys([max(nominal, default=guessed), guessed]):
        size = padded_size(img_size, multiple)
        try:
            found_padded = found if size == img_size and found else _measure(backbone, size)
        except ValueError:
            refused = refused or multiple
            continue
        reductions = _divide(size, found_padded)
        if reductions and multiple % reductions[-1] == 0:
            return found_padded, reductions
    if failure is not None:
        raise failure
    rounded = exact or [-(-img_size[0] // shape[1]) for shape in found]
    if refused and padded_size(img_size, rounded[-1]) != img_size:
        raise ValueError(
            f'Expected images whose sides are multiples of {refused}, the cells of the last map of '
            f'{type(backbone).__name__}, got {img_size[0]} x {img_size[1]}. It does not take images that are padded to '
            f'{" x ".join(map(str, padded_size(img_size, refused)))}: choose that --img-size.'
        )
    return found, rounded  # of a model for one size alone, or of convolutions without padding, which are never exact


def _nominal_reductions(backbone: nn.Module) -> List[int]:
    """The reductions that a timm model gives, empty if it gives none. They are not exact for every image size."""
    info: Any = getattr(backbone, 'feature_info', None)
    try:
        return [int(stage['reduction']) for stage in info or ()]
    except (KeyError, TypeError):
        return []


def _divide(size: Tuple[int, int], found: List[Shape]) -> List[int]:
    """Reductions of maps whose sides divide those of the image alike, empty if one does not."""
    fits = all(
        size[0] % height == 0 and size[1] % width == 0 and size[0] // height == size[1] // width
        for _, height, width in found
    )
    return [size[0] // height for _, height, _ in found] if fits else []


def _measure(backbone: nn.Module, img_size: Tuple[int, int]) -> List[Shape]:
    """Channels, height and width of every feature map of an image.

    Raises:
        ValueError: The backbone does not take images of this size.
    """
    forward_intermediates: Any = backbone.forward_intermediates
    try:
        with _probing(backbone, img_size) as image, torch.no_grad():
            found = forward_intermediates(image, output_fmt='NCHW', intermediates_only=True)
    except (AssertionError, RuntimeError) as e:
        raise ValueError(
            f'Expected a {type(backbone).__name__} that takes images of {img_size[0]} x {img_size[1]}: {e} Create it '
            'with img_size=..., dynamic_img_size=True or strict_img_size=False (--model-kwargs), where it takes these, '
            'or choose another --img-size.'
        ) from e
    return [(one.shape[1], one.shape[2], one.shape[3]) for one in found]


def rounded_up(backbone: nn.Module, maps: FeatureMaps, img_size: Tuple[int, int]) -> List[int]:
    """The reductions that earlier versions took for these maps: rounded up, whatever the size of the image."""
    found = _measure(backbone, img_size)
    return [-(-img_size[0] // found[index][1]) for index in maps.indices]


@contextlib.contextmanager
def _probing(backbone: nn.Module, img_size: Tuple[int, int]) -> Iterator[torch.Tensor]:
    """Give an image of zeros (1, C, H, W) to try a backbone with. Meanwhile the backbone is in evaluation mode."""
    convolution = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    in_chans = 3 if convolution is None else convolution.in_channels
    parameter = next(backbone.parameters())
    training = {module: module.training for module in backbone.modules()}  # a user may have left parts in evaluation
    backbone.eval()
    try:
        yield torch.zeros(1, in_chans, *img_size, device=parameter.device, dtype=parameter.dtype)
    finally:
        for module, was_training in training.items():
            module.training = was_training


def freeze_unused(
    backbone: nn.Module,
    compute: Callable[[torch.Tensor], List[torch.Tensor]],
    img_size: Tuple[int, int],
) -> None:
    """Freeze the parameters of a backbone that what is computed from it does not depend on.

    An example is the wide convolution after the last feature map of an EfficientNet. A parameter that gets no gradient
    stalls DistributedDataParallel. Frozen parameters stay in the state dict, so that plain timm loads it.

    Args:
        backbone: A timm model. It is changed in place.
        compute: Function from images to what the head takes of the backbone.
        img_size: Height and width of padded images.
    """
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    if not parameters:
        return
    with _probing(backbone, img_size) as image, torch.enable_grad():
        total = torch.stack([m.float().sum() for m in compute(image)]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.requires_grad_(gradient is not None)
