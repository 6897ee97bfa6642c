"""Resized crops and blur of a batch, other ones for each image, as products with matrices

A resize is linear and separable: every row of the result is a weighted sum of rows of the image, and every column of
columns. So the resized crop of an image is A X B^T with a matrix of weights for its rows and one for its columns, and
the crops of a batch are two batched products, whatever their places and sizes. A flip reverses the rows of a matrix.
Weights are those of PIL and of torch with antialiasing.
"""

import torch

INTERPOLATIONS = ('bilinear', 'bicubic', 'random')  # random: either, for each image
_BICUBIC_A = -0.5  # Keys' parameter, as in PIL and in torch with antialiasing
BLUR_REACH = 11  # pixels to each side, as timm's Gaussian blur has


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic: (a + 2)|x|^3 - (a + 3)|x|^2 + 1 up to 1, a(|x|^3 - 5|x|^2 + 8|x| - 4) up to 2, then 0."""
    x, a = x.abs(), _BICUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def resize_weights(
    start: torch.Tensor, length: torch.Tensor, flip: torch.Tensor, bicubic: torch.Tensor, size: int, new_size: int
) -> torch.Tensor:
    """Weights with which the pixels of a side of each image make a side of its resized crop.

    Args:
        start: Where the crop begins in each image (B,), in pixels. It need not be whole.
        length: Length of the crop (B,), in pixels.
        flip: Whether the result is reversed (B,), bool.
        bicubic: Whether the filter is bicubic (B,), bool. Otherwise it is bilinear.
        size: Length of the side of the images.
        new_size: Length of the side of the result.

    Returns:
        Weights (B, new_size, size). Rows sum to 1.
    """
    length = length.clamp(1.0, size)[:, None, None]  # at least one pixel has its centre in the crop
    start = start[:, None, None].clamp(min=0.0).minimum(size - length)
    scale = length / new_size
    place = torch.arange(new_size, device=start.device).expand(len(flip), -1)
    place = torch.where(flip[:, None], new_size - 1 - place, place)[..., None]
    pixel = torch.arange(size, device=start.device) + 0.5 - start
    distance = (pixel - (place + 0.5) * scale) / scale.clamp(min=1.0)
    weights = torch.where(bicubic[:, None, None], _cubic(distance), _triangle(distance))
    weights = weights.masked_fill((pixel < 0) | (pixel >= length), 0.0)
    return weights / weights.sum(dim=2, keepdim=True)


def blur_weights(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """Weights (B, size, size) of a Gaussian blur of each image along a side, which is reflected at its ends.

    Args:
        sigma: Standard deviation in pixels (B,), 0 for no blur.
        size: Length of the side, more than BLUR_REACH.
    """
    row = torch.arange(size, device=sigma.device)[:, None]
    column = row.T
    narrow = torch.finfo(torch.float32).tiny
    width = 2 * sigma.square().clamp(min=narrow)[:, None, None]
    # the pixel itself, and its images in the mirrors at both ends
    mirrored = ((column, True), (-column, column > 0), (2 * (size - 1) - column, column < size - 1))
    weights = torch.zeros(len(sigma), size, size, device=sigma.device)
    for place, is_there in mirrored:
        distance = place - row
        within = (distance.abs() <= BLUR_REACH) & is_there
        weights = weights + torch.exp(-distance.square() / width).masked_fill(~within, 0.0)
    return weights / weights.sum(dim=2, keepdim=True)


def apply_weights(images: torch.Tensor, of_rows: torch.Tensor, of_columns: torch.Tensor) -> torch.Tensor:
    """Resample images (B, H, W, C) by weights (B, height, H) and (B, width, W). Returns (B, C, height, width)."""
    batch_size, _, width, channels = images.shape
    low = torch.bmm(of_rows, images.flatten(2)).view(batch_size, -1, width, channels)
    low = low.movedim(3, 1)
    small = torch.bmm(low.flatten(1, 2), of_columns.transpose(1, 2))
    return small.view(*low.shape[:3], -1)
