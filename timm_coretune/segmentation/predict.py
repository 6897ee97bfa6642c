"""Masks of images that have none"""

import logging
import os
import sys
from typing import List, Sequence, Union

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from .data.folders import IMAGE_EXTENSIONS
from .data.palette import write_mask
from .data.transforms import create_eval_transform, restore
from .model import SegmentationModel

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict_image(model: SegmentationModel, image: Union[Image.Image, torch.Tensor]) -> torch.Tensor:
    """Classify the pixels of an image as in validation: fitted into the size the model was trained on, and back.

    Args:
        model: From load_segmentation_model, in evaluation mode.
        image: A PIL image, or uint8 (C, H, W).

    Returns:
        Class indices at the size of the image, uint8 (H, W), on the CPU.
    """
    if isinstance(image, Image.Image):
        image = functional.pil_to_tensor(image.convert('RGB' if len(model.data_config['mean']) == 3 else 'L'))
    size = tuple(image.shape[-2:])
    transform = create_eval_transform(model.img_size, **model.data_config)
    input, _ = transform(tv_tensors.Image(image), tv_tensors.Mask(torch.zeros(size, dtype=torch.uint8)))
    logits = model(input[None].to(next(model.parameters()).device))
    return restore(logits[0].float(), size).argmax(dim=0).to(torch.uint8).cpu()


def find_images(paths: Sequence[str]) -> List[str]:
    """Image files among paths of files and folders, in order.

    Raises:
        ValueError: There are none, or two would give masks of the same name.
    """
    found = []
    for path in paths:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [path]
        found += [os.path.join(path, name) if os.path.isdir(path) else name for name in names]
    found = [path for path in found if path.lower().endswith(IMAGE_EXTENSIONS)]
    if not found:
        raise ValueError(f'Expected images ({", ".join(IMAGE_EXTENSIONS)}) in {", ".join(paths)}, found none.')
    by_stem = {}
    for path in found:
        other = by_stem.setdefault(_stem(path), path)
        if other != path:
            raise ValueError(f'Expected images of different names, {other!r} and {path!r} would give the same mask.')
    return found


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def predict(model: SegmentationModel, paths: Sequence[str], output: str, overwrite: bool = False) -> int:
    """Write a palette PNG for every image, at its size; those that are there already are left alone.

    Args:
        model: From load_segmentation_model.
        paths: Images, or folders of images.
        output: Folder to write, made if need be.
        overwrite: Write those again that are there.

    Returns:
        Masks written.

    Raises:
        ValueError: There are no images, or one of them cannot be read.
    """
    images = find_images(paths)
    os.makedirs(output, exist_ok=True)
    masks = {path: os.path.join(output, f'{_stem(path)}.png') for path in images}
    todo = [path for path in images if overwrite or not os.path.exists(masks[path])]
    if len(todo) < len(images):
        _logger.info(f'{len(images) - len(todo)} of {len(images)} masks are there already.')
    for path in tqdm(todo, desc='Predict', disable=not sys.stderr.isatty()):
        try:
            with Image.open(path) as image:
                image.load()
        except OSError as e:
            raise ValueError(f'Expected an image in {path!r}: {e}') from e
        write_mask(predict_image(model, image), masks[path])
    return len(todo)
