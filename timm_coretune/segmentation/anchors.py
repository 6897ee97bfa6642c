"""Which pixels are contrasted: so many of every class in an image, the badly predicted before the others

Half of the anchors of a class are pixels that the model gets wrong, as long as there are such, as in ContrastiveSeg
(Wenguan Wang et al., ICCV 2021, https://arxiv.org/abs/2101.11939). An image has a fixed number of places, so that
shapes are static and the choice does not depend on the other images of a batch, nor on the number of processes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

_LOW_BITS = 0xFFFFFFFF


class Anchors(NamedTuple):
    """Pixels chosen in every image.

    Attributes:
        index: Place of each among the pixels of its image (B, A) int64.
        is_pixel: False for places that stay empty, whose index means nothing (B, A) bool.
    """

    index: torch.Tensor
    is_pixel: torch.Tensor


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """A bijection of [0, 2**32) that looks random: the integer hash lowbias32, https://nullprogram.com/blog/2018/07/31/"""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_BITS
    return x ^ (x >> 16)


def draw_noise(seed: torch.Tensor, num_pixels: int) -> torch.Tensor:
    """Uniform integers in [0, 2**32) that depend on the seed of an image and the place of a pixel alone, on any device.

    Args:
        seed: Integers in [0, 2**32), one for each image (B,) int64.
        num_pixels: Pixels of an image.

    Returns:
        (B, num_pixels) int64, all different within an image.
    """
    pixel = torch.arange(num_pixels, device=seed.device)
    return _scramble(_scramble(pixel) ^ seed[:, None])


@torch.no_grad()
def sample_anchors(label: torch.Tensor, hard: torch.Tensor, seed: torch.Tensor, num_anchors: int) -> Anchors:
    """Choose pixels: deterministic, no host synchronisation, static shapes.

    The classes of an image take turns. A class gives a hard pixel, then an easy one, and so on; when it is out of one
    kind it goes on with the other, and when it is out of pixels the remaining classes go on without it.

    Args:
        label: Class of every pixel, negative for pixels that are never chosen (B, P) int64.
        hard: Whether the model gets the pixel wrong (B, P) bool.
        seed: Integers in [0, 2**32), one for each image (B,) int64.
        num_anchors: Places A of an image.
    """
    batch_size, num_pixels = label.shape
    noise = draw_noise(seed, num_pixels)
    # Sorted by class, then hard before easy, then noise: a class has two runs. Ignored pixels come last.
    group = torch.where(label >= 0, 2 * label + (~hard).long(), _LOW_BITS >> 2)
    sorted_key, by_key = torch.sort(group << 32 | noise, dim=1)
    group, noise = sorted_key >> 32, sorted_key & _LOW_BITS
    rank = torch.arange(num_pixels, device=label.device) - torch.searchsorted(group, group)
    other = group ^ 1
    num_other = torch.searchsorted(group, other, right=True) - torch.searchsorted(group, other)
    # the turn of a pixel in its class: after those of its kind before it, and as many of the other kind
    turn = rank + torch.minimum(rank + (group & 1), num_other)
    is_pixel = group < _LOW_BITS >> 2
    priority = torch.where(is_pixel, turn, num_pixels) << 32 | noise
    num_chosen = min(num_anchors, num_pixels)
    chosen = priority.topk(num_chosen, dim=1, largest=False).indices
    empty = (0, num_anchors - num_chosen)
    return Anchors(
        F.pad(by_key.gather(1, chosen), empty),
        F.pad(is_pixel.gather(1, chosen), empty),
    )
