"""Predict the masks of images with a trained segmentation model"""

import logging
import sys
from typing import Sequence, Tuple, Union

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from ..data.images import convert, open_file, reason_of, upright
from ..report.plots import plot_segmentation
from .data.dataset import SegmentationDataset
from .data.palette import voc_palette, write_mask
from .data.transforms import create_eval_transform, restore
from .description import MAX_CLASSES
from .model import SegmentationModel
from .outputs import Output, plan_outputs

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict_image(model: SegmentationModel, image: Union[Image.Image, torch.Tensor]) -> torch.Tensor:
    """Predict the class of every pixel of an image.

    The image is prepared as in validation: it is fitted into the image size of the training at its own aspect ratio.
    The logits are resized back to the size of the image. A photo with an EXIF orientation is turned upright first, and
    a transparent image is composed on white.

    Args:
        model: A model in evaluation mode, from `load_segmentation_model`.
        image: A PIL image, or a tensor uint8 (C, H, W).

    Returns:
        Class indices at the size of the image as a viewer shows it, uint8 (H, W), on the CPU.
    """
    input, size = _prepare(model, image)
    logits = model(input.to(next(model.parameters()).device))
    del input
    return classes_of_pixels(logits[0].float(), size).cpu()


def _prepare(model: SegmentationModel, image: Union[Image.Image, torch.Tensor]) -> Tuple[torch.Tensor, Tuple[int, int]]:
    """A batch of this image alone, as the model takes it, and height and width of the image as it is shown."""
    if isinstance(image, Image.Image):
        mode = 'RGB' if len(model.data_config['mean']) == 3 else 'L'
        pixels = functional.pil_to_tensor(convert(upright(image), mode))
    else:
        pixels = image
    height, width = pixels.shape[-2:]
    transform = create_eval_transform(model.img_size, **model.data_config)
    mask = torch.zeros((), dtype=torch.uint8).expand(height, width)  # of no use here, but the transform takes one
    input, _ = transform(tv_tensors.Image(pixels), tv_tensors.Mask(mask))
    return input[None], (height, width)


def classes_of_pixels(logits: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Resize logits to the size of an image, and take the class of the highest in every pixel.

    The result is that of `restore(logits, size).argmax(dim=0)`. But one class after the other is resized, so that the
    memory for a large image does not grow with the number of classes: it is about 13 bytes per pixel.

    Args:
        logits: Logits of the fitted and padded image (num_classes, H, W).
        size: Height and width of the image.

    Returns:
        Class indices, uint8 of this size.

    Raises:
        ValueError: There are more classes than a byte can tell apart.
    """
    if len(logits) > MAX_CLASSES:
        raise ValueError(f'Expected at most {MAX_CLASSES} classes, as a mask has a byte for each, got {len(logits)}.')
    best = restore(logits[:1], size)[0]
    classes = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for index in range(1, len(logits)):
        values = restore(logits[index : index + 1], size)[0]
        is_better = (values <= best).logical_not_().logical_and_(best == best)  # NaN is the highest, as for argmax
        classes.masked_fill_(is_better, index)
        torch.maximum(best, values, out=best)
    return classes


def predict(model: SegmentationModel, paths: Sequence[str], output: str, overwrite: bool = False) -> int:
    """Write the predicted mask of every image as a palette PNG of the size of the image, as a viewer shows it.

    Args:
        model: A model in evaluation mode, from `load_segmentation_model`.
        paths: Image files, or folders of images.
        output: Folder to write the masks to, created if missing.
        overwrite: Predict and write masks again that already exist in the folder. Otherwise they are skipped.

    Returns:
        Number of masks that were written.

    Raises:
        ValueError: There are no images, one of them cannot be read, or the masks cannot be written without replacing
            an image.
    """
    return write_outputs(model, plan_outputs(paths, output, overwrite))


def write_outputs(model: SegmentationModel, outputs: Sequence[Output]) -> int:
    """Predict images and write their masks. Returns the number of masks.

    Raises:
        ValueError: An image cannot be read, or a mask cannot be written.
    """
    for path, mask in tqdm(outputs, desc='Predict', disable=not sys.stderr.isatty()):
        try:
            with open_file(path) as image:
                image.load()
        except Exception as e:  # decoders raise errors of many kinds
            raise ValueError(f'Expected an image in {path!r}: {reason_of(e)}.') from e
        classes = predict_image(model, image)
        try:
            write_mask(classes, mask)
        except OSError as e:
            raise ValueError(f'Expected to write the mask of {path!r} to {mask!r}: {e}.') from e
    return len(outputs)


def draw_predictions(model: SegmentationModel, dataset: SegmentationDataset, path: str, num_images: int = 6) -> None:
    """Draw the first images of a data set with their masks and what a model predicts.

    Args:
        model: A model in evaluation mode, from `load_segmentation_model`.
        dataset: Images with masks. Its transform is removed.
        path: PNG to write.
        num_images: Number of images to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    dataset.transform = None
    samples = [dataset[index] for index in range(min(num_images, len(dataset)))]
    images, masks = [image for image, _ in samples], [mask for _, mask in samples]
    predictions = [predict_image(model, image) for image in images]
    plot_segmentation(images, masks, predictions, voc_palette(), dataset.class_names, path, dataset.ignore_index)
