"""Sends pictures to experiment trackers: images of the first batch, and the worst mistakes of a validation"""

import math
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw

NUM_SHOWN = 16
_SIDE = 128  # pixels of an image in the picture, at least
_LINE = 14  # height of a line of text in pixels


def tile(images: torch.Tensor, texts: Sequence[str]) -> Image.Image:
    """Put images (N, 3, H, W) in [0, 1] next to each other, a text below each."""
    scale = max(1, math.ceil(_SIDE / max(images.shape[2:])))
    images = F.interpolate(images.float(), scale_factor=scale, mode='nearest')
    height, width = images.shape[2], images.shape[3]
    num_columns = math.ceil(math.sqrt(len(images)))
    size = (num_columns * width, math.ceil(len(images) / num_columns) * (height + _LINE))
    canvas = Image.new('RGB', size, 'white')
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, (picture, text) in enumerate(zip(pixels, texts, strict=True)):
        row, column = divmod(index, num_columns)
        cell = Image.new('RGB', (width, height + _LINE), 'white')  # a long text ends with its image
        cell.paste(Image.fromarray(picture), (0, 0))
        ImageDraw.Draw(cell).text((2, height + 1), text.encode('ascii', 'replace').decode(), fill='black')
        canvas.paste(cell, (column * width, row * (height + _LINE)))
    return canvas


def log_image(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to those trackers that take pictures.

    Args:
        accelerator: Has the trackers.
        name: Name of the picture in the trackers.
        picture: The picture.
        step: Number of updates so far.
    """
    if not accelerator.is_main_process:
        return
    pixels = np.asarray(picture)
    for tracker in accelerator.trackers:
        if tracker.name == 'trackio':  # accelerate sends it no pictures
            import trackio

            tracker.log({name: trackio.Image(pixels)}, step=step)
        elif tracker.name == 'tensorboard':
            tracker.log_images({name: pixels[None]}, step=step, dataformats='NHWC')
        elif tracker.name in ('wandb', 'swanlab'):
            tracker.log_images({name: [pixels]}, step=step)
        elif hasattr(tracker, 'log_images'):  # aim and clearml take one picture by name
            tracker.log_images({name: pixels}, step=step)


class Pictures:
    """Draws pictures for the trackers.

    Args:
        accelerator: Processes and trackers.
        mean: Mean of each channel of the images, which were normalised.
        std: Their standard deviation.
        class_names: Names of the classes by index. When None their indices.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Optional[Sequence[str]] = None,
    ):
        self.accelerator = accelerator
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.class_names = class_names
        self.worst: List[Tuple[torch.Tensor, ...]] = []

    def _name(self, label: int) -> str:
        return str(label) if self.class_names is None else self.class_names[label]

    def _restore(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float().cpu() * self.std + self.mean
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]

    def log_batch(self, input: Any, target: torch.Tensor, step: int) -> None:
        """Show the first images of a training batch of the main process, and their classes. Patches are not shown."""
        if not isinstance(input, torch.Tensor) or not self.accelerator.is_main_process:
            return
        texts = [''] * NUM_SHOWN
        if target.ndim == 1:
            texts = [self._name(label) for label in target[:NUM_SHOWN].tolist()]
        elif target.ndim == 2:  # of mixed pixels, or of several labels
            texts = [
                ' '.join(self._name(int(i)) for i in (row > 0.1).nonzero()[:3, 0]) for row in target[:NUM_SHOWN].cpu()
            ]
        images = self._restore(input[:NUM_SHOWN])
        log_image(self.accelerator, 'images/batch', tile(images, texts[: len(images)]), step)

    def start_validation(self) -> None:
        """Forget the mistakes of the validation before."""
        self.worst = []

    def update(self, input: Any, output: torch.Tensor, target: torch.Tensor) -> None:
        """Keep the mistakes of highest loss of a validation batch, without waiting for the device."""
        if not isinstance(input, torch.Tensor) or target.ndim != 1 or output.ndim != 2:
            return
        input = input[: len(target)]
        predicted = output.argmax(dim=1)
        loss = F.cross_entropy(output, target, reduction='none').masked_fill(predicted == target, -math.inf)
        found: Tuple[torch.Tensor, ...] = (loss, input, target, predicted)
        if self.worst:
            found = tuple(torch.cat(parts) for parts in zip(self.worst[0], found, strict=True))
        index = found[0].topk(min(NUM_SHOWN, len(found[0]))).indices
        self.worst = [tuple(part[index] for part in found)]

    def log_mistakes(self, step: int) -> None:
        """Show the mistakes of highest loss of all processes. All processes must call this together."""
        rows = []
        for loss, *row in zip(*(part.cpu() for part in self.worst[0]), strict=True) if self.worst else ():
            if not math.isinf(loss) and not math.isnan(loss):
                rows.append((float(loss), *row))
        rows = sorted(gather_object(rows), key=lambda row: -row[0])[:NUM_SHOWN]
        if not rows or not self.accelerator.is_main_process:
            return
        texts = [f'{self._name(int(target))} as {self._name(int(predicted))}' for *_, target, predicted in rows]
        images = self._restore(torch.stack([image for _, image, *_ in rows]))
        log_image(self.accelerator, 'images/mistakes', tile(images, texts), step)
