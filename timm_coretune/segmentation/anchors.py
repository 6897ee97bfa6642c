"""Anchors: the pixels of an image that the contrastive loss compares

The classes of an image get equally many anchors, as far as they have enough pixels. Half of the anchors of a class are
hard pixels, that is pixels that the model gets wrong, as far as there are enough of them. This is the sampling of
ContrastiveSeg (Wenguan Wang et al., ICCV 2021, https://arxiv.org/abs/2101.11939). Every image has the same number of
places for anchors. Tensor shapes are therefore static, and the anchors of an image depend neither on the other images
of the batch nor on the number of processes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

_LOW_BITS = 0xFFFFFFFF


class Anchors(NamedTuple):
    """The anchors of every image of a batch, A places for each image.

    Attributes:
        index: Index of the anchor among the pixels of its image (B, A) int64. In an empty place it is meaningless.
        is_pixel: Whether the place has an anchor (B, A) bool. False if the image has fewer pixels with a class than A.
    """

    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which is of no use for tensors
    is_pixel: torch.Tensor


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """Hash integers one to one within [0, 2**32), by lowbias32: https://nullprogram.com/blog/2018/07/31/"""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_BITS
    return x ^ (x >> 16)


def draw_noise(seed: torch.Tensor, num_pixels: int) -> torch.Tensor:
    """Draw uniform integers in [0, 2**32), one for each pixel. They are the same on every device.

    A draw depends on the seed of its image and on the index of its pixel, and on nothing else.

    Args:
        seed: Integers in [0, 2**32), one for each image (B,) int64.
        num_pixels: Number of pixels of an image.

    Returns:
        Integers (B, num_pixels) int64. Within an image all are different.
    """
    pixel = torch.arange(num_pixels, device=seed.device)
    return _scramble(_scramble(pixel) ^ seed[:, None])


@torch.no_grad()
def sample_anchors(label: torch.Tensor, hard: torch.Tensor, seed: torch.Tensor, num_anchors: int) -> Anchors:
    """Choose the anchors of every image, deterministically, without waiting for the device, and with static shapes.

    The classes of an image take turns. On its turns a class gives a hard pixel, then an easy one, and so on. A class
    without hard pixels left gives easy ones, and the other way round. A class without pixels left gets no more turns.

    Args:
        label: Class of every pixel, negative for pixels that are never chosen (B, P) int64.
        hard: Whether the model gets the pixel wrong (B, P) bool.
        seed: Integers in [0, 2**32), one for each image (B,) int64.
        num_anchors: Number of places A for anchors in each image.
    """
    batch_size, num_pixels = label.shape
    noise = draw_noise(seed, num_pixels)
    # Sort the pixels by class, then hard before easy, then noise: every class has two groups. Ignored ones come last.
    group = torch.where(label >= 0, 2 * label + (~hard).long(), _LOW_BITS >> 2)
    sorted_key, by_key = torch.sort(group << 32 | noise, dim=1)
    group, noise = sorted_key >> 32, sorted_key & _LOW_BITS
    rank = torch.arange(num_pixels, device=label.device) - torch.searchsorted(group, group)
    other = group ^ 1
    num_other = torch.searchsorted(group, other, right=True) - torch.searchsorted(group, other)
    # Turn of a pixel within its class: the pixels of its own group before it, and as many of the other group.
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
