"""Random views of a whole batch of pictures at once, as operations on tensors."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass
class Augment:
    """Random views of square RGB pictures.

    All draws are made on the CPU from one generator, so that a run sees the same views whatever the device.

    Args:
        img_size: Side of a view in pixels.
        min_crop: Smallest share of the area that a random resized crop keeps.
        flip_prob: Share of the views that are mirrored.
        rotation: Largest angle of a rotation in degrees.
        jitter: Largest relative change of brightness, contrast and saturation. The hue turns by up to a quarter of it,
            as a share of the circle.
        grey_prob: Share of the views without colour.
        blur_prob: Share of the views that are blurred.
        generator: Source of every random draw.
    """

    img_size: int
    min_crop: float
    flip_prob: float
    rotation: float
    jitter: float
    grey_prob: float
    blur_prob: float
    generator: torch.Generator

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns one view with values in [0, 1] of each uint8 picture (batch, 3, side, side)."""
        return self._blur(self._change_colours(self._crop(pictures.float() / 255)))

    def _uniform(self, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return (low + (high - low) * torch.rand(len(x), generator=self.generator)).to(x.device)

    def _happens(self, x: torch.Tensor, probability: float) -> torch.Tensor:
        return self._uniform(x, 0, 1) < probability

    def _crop(self, x: torch.Tensor) -> torch.Tensor:
        area = self._uniform(x, self.min_crop, 1)
        ratio = self._uniform(x, math.log(3 / 4), math.log(4 / 3)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        # In affine_grid's coordinates the image spans [-1, 1]: a crop of relative width w has room 1 - w to each side.
        shift = torch.stack([(1 - side) * self._uniform(x, -1, 1) for side in (width, height)], dim=1)
        width = torch.where(self._happens(x, self.flip_prob), -width, width)
        angle = self._uniform(x, -1, 1) * math.radians(self.rotation)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([cos * width, -sin * height, sin * width, cos * height], dim=1).view(-1, 2, 2)
        theta = torch.cat([turn, shift.unsqueeze(2)], dim=2)
        grid = F.affine_grid(theta, [len(x), 3, self.img_size, self.img_size], align_corners=False)
        return F.grid_sample(x, grid, padding_mode='border', align_corners=False)

    def _change_colours(self, x: torch.Tensor) -> torch.Tensor:
        brightness, contrast, saturation = (self._uniform(x, 1 - self.jitter, 1 + self.jitter) for _ in range(3))
        saturation = saturation * ~self._happens(x, self.grey_prob)
        angle = self._uniform(x, -1, 1) * (self.jitter / 4 * 2 * math.pi)
        x = (x * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = ((x - mean) * contrast.view(-1, 1, 1, 1) + mean).clamp(0, 1)
        # In YIQ, saturation and hue are the length and the angle of the last two components
        cos, sin, zero = saturation * angle.cos(), saturation * angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
        to_yiq = _TO_YIQ.to(x)
        return (torch.linalg.inv(to_yiq) @ turn @ to_yiq @ x.flatten(2)).view_as(x).clamp(0, 1)

    def _blur(self, x: torch.Tensor) -> torch.Tensor:
        taps = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
        kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
        blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode='replicate'), kernel, groups=3)
        # A mix with the sharp image stands in for a random width of the Gaussian, which would need a kernel per image.
        strength = self._happens(x, self.blur_prob) * self._uniform(x, 0, 1)
        return torch.lerp(x, blurred, strength.view(-1, 1, 1, 1))
