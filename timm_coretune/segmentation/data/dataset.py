"""Data sets of images with masks, from wherever they lie"""

import os
from typing import Any, Callable, List, Optional, Sequence, Tuple

from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from .folders import Source, open_folders, read_lines
from .libraries import HfSource, TorchvisionSource
from .masks import IGNORE_INDEX, check_mask, count_classes, read_mask
from .scenes import FashionScenes

IMAGE_MODES = ('RGB', 'L')


class SegmentationDataset(Dataset):
    """Images with masks of class indices.

    An item is tv_tensors.Image uint8 (C, H, W) and tv_tensors.Mask (H, W), or what the transform makes of the two.

    Args:
        source: Images and masks of a split.
        num_classes: Classes are 0 to num_classes - 1.
        class_names: Names by index.
        reduce_zero_label: Let 0 in the masks be ignored and move the other classes down by one, as in ADE20K.
        img_mode: PIL mode of the images, RGB or L.

    Attributes:
        transform: Takes and returns an image and its mask, None to leave them as they are.

    Raises:
        ValueError: An argument is out of range. From an item: its files cannot be read, or do not fit each other or the
            classes; the message names them.
    """

    def __init__(
        self,
        source: Source,
        num_classes: int,
        class_names: Optional[Sequence[str]] = None,
        reduce_zero_label: bool = False,
        img_mode: str = 'RGB',
    ):
        if not 1 <= num_classes <= IGNORE_INDEX:
            raise ValueError(
                f'Expected 1 to {IGNORE_INDEX} classes, as the value {IGNORE_INDEX} marks pixels to leave out, got '
                f'{num_classes}. Check the masks, such as {source.name(0)}.'
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f'Expected a name for each of {num_classes} classes, got {len(class_names)}: '
                f'{", ".join(class_names[:5])}, ... Write one a line to classes.txt beside the data, or leave the '
                'number of classes out.'
            )
        if img_mode not in IMAGE_MODES:
            raise ValueError(f'Expected img_mode as one of {", ".join(IMAGE_MODES)}, got {img_mode!r}.')
        self.source = source
        self.num_classes = num_classes
        self.class_names = None if class_names is None else list(class_names)
        self.reduce_zero_label = reduce_zero_label
        self.img_mode = img_mode
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        name = self.source.name(index)
        try:
            image, mask = self.source.load(index)
            image = image.convert(self.img_mode)
            mask = read_mask(mask, name, image.size, self.reduce_zero_label)
        except OSError as e:
            raise ValueError(f'Expected an image and a mask that can be read for {name}: {e}') from e
        check_mask(mask, self.num_classes, name)
        image, mask = tv_tensors.Image(functional.pil_to_tensor(image)), tv_tensors.Mask(mask)
        return (image, mask) if self.transform is None else self.transform(image, mask)


def open_dataset(
    name: str,
    root: str,
    split: str,
    num_classes: Optional[int] = None,
    class_names: Optional[Sequence[str]] = None,
    reduce_zero_label: bool = False,
    img_mode: str = 'RGB',
    input_key: Optional[str] = None,
    target_key: Optional[str] = None,
    download: bool = False,
    hold_out: bool = True,
) -> SegmentationDataset:
    """Open a split of a data set.

    Args:
        name: '' for folders or a safetensors file of garments, torch/... for torchvision, hfds/... for Hugging Face.
        root: Where the data lie or are downloaded to.
        split: Name of the split, or a synonym.
        num_classes: Classes there are; if None those with a name, or those in the masks of this split.
        class_names: Names by index; if None the lines of classes.txt in root, or those that the data come with.
        reduce_zero_label: Let 0 in the masks be ignored and move the other classes down by one.
        img_mode: PIL mode of the images, RGB or L.
        input_key: Column of the images, of Hugging Face.
        target_key: Column of the masks, of Hugging Face.
        download: Let torchvision download.
        hold_out: Keep every tenth image for validation where there are no splits.

    Raises:
        ValueError: The data do not exist, or do not fit the arguments.
    """
    if name.startswith('torch/'):
        source = TorchvisionSource(name, root, split, download)
    elif name.startswith('hfds/'):
        source = HfSource(name, root, split, input_key, target_key)
    elif name:
        raise ValueError(f"Expected a data set torch/... or hfds/..., or '' for folders in root, got {name!r}.")
    elif root.endswith('.safetensors'):
        source = FashionScenes(root, split)
    else:
        source = open_folders(root, split, hold_out)
    class_names = class_names or _read_class_names(root) or source.class_names
    if num_classes is None:
        num_classes = len(class_names) if class_names else count_classes(source, reduce_zero_label)
    return SegmentationDataset(source, num_classes, class_names, reduce_zero_label, img_mode)


def _read_class_names(root: str) -> Optional[List[str]]:
    path = os.path.join(root, 'classes.txt')
    return read_lines(path) if root and os.path.isfile(path) else None
