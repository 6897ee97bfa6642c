"""Data sets of images with masks, from folders, torchvision or Hugging Face"""

import logging
import os
from typing import Any, Callable, List, Optional, Sequence, Tuple

from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from ...data.images import convert, reason_of, upright
from .folders import Source, open_folders, read_lines
from .libraries import HfSource, TorchvisionSource
from .mapped import map_masks
from .masks import IGNORE_INDEX, WrongMaskError, check_mask, count_classes, ignored_value, read_mask, replace
from .scenes import FashionScenes

_logger = logging.getLogger(__name__)

IMAGE_MODES = ('RGB', 'L')
MAX_CLASSES = IGNORE_INDEX


class SegmentationDataset(Dataset):
    """Images with masks of class indices.

    An item is a pair of tv_tensors.Image uint8 (C, H, W) and tv_tensors.Mask (H, W). With a transform the item is what
    the transform returns for this pair. Reading an item raises ValueError if a file cannot be read, if image and mask
    have different sizes, or if the mask has a value that is no class. The message names the file. Images and masks are
    upright, and transparent images on white, see data/images.py. An image is left as it is stored if its mask fits only
    then.

    Args:
        source: Images and masks of a split.
        num_classes: Number of classes. Class indices are 0 to num_classes - 1.
        class_names: Names of the classes by index.
        reduce_zero_label: Ignore the value 0 in the masks and lower all other classes by one, as for ADE20K.
        img_mode: PIL mode of the images, RGB or L.
        ignore_index: Value of the pixels to leave out, in the files of the masks and in the items. A source that marks
            these pixels by a value of its own, as one of torchvision does, has them marked by this one in the items.

    Attributes:
        transform: Function that takes and returns an image and its mask, None to leave them as they are.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        source: Source,
        num_classes: int,
        class_names: Optional[Sequence[str]] = None,
        reduce_zero_label: bool = False,
        img_mode: str = 'RGB',
        ignore_index: int = IGNORE_INDEX,
    ):
        if not 1 <= num_classes <= MAX_CLASSES:
            raise ValueError(
                f'Expected 1 to {MAX_CLASSES} classes, as predicted masks are files of bytes in which {IGNORE_INDEX} '
                f'marks pixels to leave out, got {num_classes}. Check the masks, such as {source.name(0)}.'
            )
        if reduce_zero_label and 0 <= ignore_index < num_classes:
            raise ValueError(
                f'Expected an ignore_index that is no class with reduce_zero_label, which ignores 0 already, got '
                f'{ignore_index} with {num_classes} classes. Leave one of the two out.'
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
        self.ignore_index = ignore_index
        self.transform: Optional[Callable[[Any, Any], Tuple[Any, Any]]] = None
        self._says_stored = False  # whether it was logged that an image is not turned

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        name = self.source.name(index)
        try:
            stored_image, stored_mask = self.source.load(index)
            loaded_image, loaded_mask = self._orient(stored_image, stored_mask, name)
            loaded_image = convert(loaded_image, self.img_mode)
        except (IndexError, WrongMaskError):  # the first ends an iteration
            raise
        except Exception as e:  # decoders raise errors of many kinds
            raise ValueError(f'Expected an image and a mask that can be read for {name}: {reason_of(e)}.') from e
        marker = ignored_value(self.source, self.ignore_index)
        indices = read_mask(loaded_mask, name, loaded_image.size, self.reduce_zero_label, marker)
        if marker != self.ignore_index:
            indices = replace(indices, indices == marker, self.ignore_index)
        check_mask(indices, self.num_classes, name, self.ignore_index)
        image, mask = tv_tensors.Image(functional.pil_to_tensor(loaded_image)), tv_tensors.Mask(indices)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def _orient(self, image: Image.Image, mask: Image.Image, name: str) -> Tuple[Image.Image, Image.Image]:
        """Turn image and mask upright by their EXIF, or the image not if the mask was drawn on it as it is stored."""
        shown, mask = upright(image), upright(mask)
        if shown.size == mask.size or image.size != mask.size or image.size == shown.size:
            return shown, mask
        if not self._says_stored:
            self._says_stored = True
            _logger.warning(
                f'The EXIF of the image of {name} turns it, but its mask of {mask.size[0]} x {mask.size[1]} pixels '
                'fits the image as it is stored: such images are not turned here. When masks are predicted, they are. '
                'To be sure, turn such images once and for all, with their masks, and save them without EXIF.'
            )
        return image, mask


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
    ignore_index: int = IGNORE_INDEX,
) -> SegmentationDataset:
    """Open a split of a data set.

    Args:
        name: `torch/...` for a data set of torchvision, `hfds/...` for one of Hugging Face, '' for what is at root:
            folders, or a safetensors file of garments.
        root: Folder with the data, or to download the data to. For garments, the safetensors file.
        split: Name of the split, or a synonym such as `val` for `validation`.
        num_classes: Number of classes. When None the number of class names, or else the classes in the masks of this
            split are counted.
        class_names: Names of the classes by index. When None the lines of classes.txt in root, or else the names that
            come with the data.
        reduce_zero_label: Ignore the value 0 in the masks and lower all other classes by one.
        img_mode: PIL mode of the images, RGB or L.
        input_key: Column with the images, for data sets of Hugging Face.
        target_key: Column with the masks, for data sets of Hugging Face.
        download: Let torchvision download missing data.
        hold_out: Keep every tenth image for validation if folders have no splits.
        ignore_index: Value of the pixels to leave out, in the files and in the items.

    Raises:
        ValueError: The data do not exist, or do not fit the arguments.
    """
    source = open_source(name, root, split, input_key, target_key, download, hold_out)
    (source,) = map_masks([source], reduce_zero_label=reduce_zero_label, ignore_index=ignore_index)
    class_names = class_names or read_class_names(root)
    return create_dataset(source, num_classes, class_names, reduce_zero_label, img_mode, ignore_index)


def open_source(
    name: str,
    root: str,
    split: str,
    input_key: Optional[str] = None,
    target_key: Optional[str] = None,
    download: bool = False,
    hold_out: bool = True,
) -> Source:
    """Open the images and masks of a split, with the arguments of `open_dataset`."""
    if name.startswith('torch/'):
        return TorchvisionSource(name, root, split, download)
    if name.startswith('hfds/'):
        return HfSource(name, root, split, input_key, target_key)
    if name:
        raise ValueError(f"Expected a data set torch/... or hfds/..., or '' for folders in root, got {name!r}.")
    if root.endswith('.safetensors'):
        return FashionScenes(root, split)
    return open_folders(root, split, hold_out)


def create_dataset(
    source: Source,
    num_classes: Optional[int] = None,
    class_names: Optional[Sequence[str]] = None,
    reduce_zero_label: bool = False,
    img_mode: str = 'RGB',
    ignore_index: int = IGNORE_INDEX,
) -> SegmentationDataset:
    """Create the data set of a source. Number and names of classes come from the source where they are None."""
    class_names = class_names or source.class_names
    if num_classes is None:
        num_classes = len(class_names) if class_names else count_classes(source, reduce_zero_label, ignore_index)
    return SegmentationDataset(source, num_classes, class_names, reduce_zero_label, img_mode, ignore_index)


def read_class_names(root: str) -> Optional[List[str]]:
    """Names of the classes in classes.txt beside the data, None if there is no such file."""
    path = os.path.join(root, 'classes.txt')
    return read_lines(path) if root and os.path.isfile(path) else None
