"""Predict the masks of images with a trained segmentation model"""

import logging
import os
import sys
from typing import Dict, List, Sequence, Union

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from ..data.images import convert, is_hidden, reason_of, upright
from ..report.plots import plot_segmentation
from .data.dataset import SegmentationDataset
from .data.pairs import IMAGE_EXTENSIONS
from .data.palette import voc_palette, write_mask
from .data.transforms import create_eval_transform, restore
from .model import SegmentationModel

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
    if isinstance(image, Image.Image):
        mode = 'RGB' if len(model.data_config['mean']) == 3 else 'L'
        pixels = functional.pil_to_tensor(convert(upright(image), mode))
    else:
        pixels = image
    height, width = pixels.shape[-2:]
    transform = create_eval_transform(model.img_size, **model.data_config)
    input, _ = transform(tv_tensors.Image(pixels), tv_tensors.Mask(torch.zeros(height, width, dtype=torch.uint8)))
    logits = model(input[None].to(next(model.parameters()).device))
    return restore(logits[0].float(), (height, width)).argmax(dim=0).to(torch.uint8).cpu()


def find_images(paths: Sequence[str]) -> List[str]:
    """List the image files among the given files and in the given folders, in this order.

    Raises:
        ValueError: There are no images, or the masks of two images would have the same name.
    """
    found: List[str] = []
    for path in paths:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [path]
        found += [os.path.join(path, name) if os.path.isdir(path) else name for name in names]
    found = [path for path in found if path.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(path)]
    if not found:
        raise ValueError(f'Expected images ({", ".join(IMAGE_EXTENSIONS)}) in {", ".join(paths)}, found none.')
    by_stem: Dict[str, str] = {}
    for path in found:
        other = by_stem.setdefault(_stem(path), path)
        if other != path:
            raise ValueError(f'Expected images of different names, {other!r} and {path!r} would give the same mask.')
    return found


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


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
        ValueError: There are no images, or one of them cannot be read.
    """
    images = find_images(paths)
    os.makedirs(output, exist_ok=True)
    masks = {path: os.path.join(output, f'{_stem(path)}.png') for path in images}
    todo = [path for path in images if overwrite or not os.path.exists(masks[path])]
    if len(todo) < len(images):
        _logger.info(f'{len(images) - len(todo)} of {len(images)} masks exist already and are skipped.')
    for path in tqdm(todo, desc='Predict', disable=not sys.stderr.isatty()):
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as e:  # decoders raise errors of many kinds
            raise ValueError(f'Expected an image in {path!r}: {reason_of(e)}.') from e
        write_mask(predict_image(model, image), masks[path])
    return len(todo)


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
