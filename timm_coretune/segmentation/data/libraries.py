"""Sources of images and masks from data sets of torchvision and of the Hugging Face Hub"""

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

from PIL import Image
from torchvision import datasets as tv_datasets

from .folders import resolve_split
from .masks import IGNORE_INDEX
from .palette import VOC_CLASSES

IMAGE_COLUMNS = ('image', 'img', 'pixel_values')
MASK_COLUMNS = ('mask', 'annotation', 'label', 'labels', 'segmentation', 'segmentation_mask')


def _open_voc(root: str, split: str, **kwargs: Any) -> Any:
    return tv_datasets.VOCSegmentation(root, image_set=split, **kwargs)


def _open_sbd(root: str, split: str, **kwargs: Any) -> Any:
    return tv_datasets.SBDataset(root, image_set=split, mode='segmentation', **kwargs)


def _open_cityscapes(root: str, split: str) -> Any:
    dataset = tv_datasets.Cityscapes(root, split=split, mode='fine', target_type='semantic')
    # torchvision leaves them in the order of the file system; one image has one mask, so both sort alike
    dataset.images.sort()
    dataset.targets.sort()
    return dataset


def _open_pet(root: str, split: str, **kwargs: Any) -> Any:
    return tv_datasets.OxfordIIITPet(root, split=split, target_types='segmentation', **kwargs)


def _cityscapes_table() -> List[int]:
    """Class of every value in the mask files. The files have several values for pixels to ignore."""
    table = [IGNORE_INDEX] * 256
    for kind in tv_datasets.Cityscapes.classes:
        if kind.id >= 0:
            table[kind.id] = kind.train_id
    return table


class _Kind(NamedTuple):
    create: Callable[..., Any]  # opens the data set: takes root and split, and download if can_download
    splits: Tuple[str, ...]
    class_names: Tuple[str, ...]
    files: Optional[Callable[[Any], Sequence[Any]]]  # returns the files of the masks, given the data set
    table: Optional[List[int]] = None  # class of every value in the mask files, None if the values are the classes
    can_download: bool = True


TORCHVISION_KINDS = {
    'voc_segmentation': _Kind(_open_voc, ('train', 'val', 'trainval'), VOC_CLASSES, lambda dataset: dataset.masks),
    'sbd': _Kind(_open_sbd, ('train', 'val', 'train_noval'), VOC_CLASSES, lambda dataset: dataset.masks),
    'cityscapes': _Kind(
        _open_cityscapes,
        ('train', 'val', 'test'),
        tuple(kind.name for kind in tv_datasets.Cityscapes.classes if 0 <= kind.train_id < IGNORE_INDEX),
        lambda dataset: [target for (target,) in dataset.targets],
        table=_cityscapes_table(),
        can_download=False,
    ),
    'oxford_iiit_pet': _Kind(
        _open_pet,
        ('trainval', 'test'),
        ('pet', 'background', 'border'),
        None,
        table=[IGNORE_INDEX, *range(255)],  # the files count classes from 1
    ),
}


class TorchvisionSource:
    """Images and masks of a data set of torchvision.

    Args:
        name: `torch/` and a key of TORCHVISION_KINDS.
        root: Folder with the data, or to download the data to.
        split: Name of the split, or a synonym such as `val` for `validation`.
        download: Download the data if they are missing.

    Raises:
        ValueError: There is no such data set or split, or its data are missing.
    """

    ignore_index = IGNORE_INDEX

    def __init__(self, name: str, root: str, split: str, download: bool = False):
        kind = TORCHVISION_KINDS.get(name.removeprefix('torch/'))
        if kind is None:
            known = ', '.join(f'torch/{known}' for known in TORCHVISION_KINDS)
            raise ValueError(f'Expected one of the data sets {known}, got {name!r}.')
        if download and not kind.can_download:
            raise ValueError(
                f'Expected the data of {name} in {root!r} already, got download=True. Their site asks for an account: '
                'download and unpack them there.'
            )
        self.split = resolve_split(split, kind.splits, name)
        self.title = name
        self.table = kind.table
        self.class_names = list(kind.class_names)
        try:
            self.dataset = kind.create(root, self.split, **({'download': download} if kind.can_download else {}))
        except (RuntimeError, OSError, ValueError) as e:
            raise ValueError(f'Expected the {self.split} split of {name} in {root!r}: {e}') from e
        self.files = kind.files(self.dataset) if kind.files is not None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        image, mask = self.dataset[index]
        return image, mask if self.table is None else mask.point(self.table)

    def name(self, index: int) -> str:
        return str(self.files[index]) if self.files is not None else f'{self.title} {self.split}[{index}]'


class HfSource:
    """Images and masks of a data set of the Hugging Face Hub, or of a folder that `datasets` can load.

    Args:
        name: `hfds/` and the name of the data set, or `hfds/` and a folder.
        root: Folder to keep downloads in. When '' the cache folder of `datasets`.
        split: Name of the split, or a synonym such as `val` for `validation`. It may be a slice such as train[:90%].
        input_key: Column with the images. When None the first one with a usual name, such as `image`.
        target_key: Column with the masks. When None the first one with a usual name, such as `mask`.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: The data set cannot be loaded, or lacks the split or a column.
    """

    def __init__(
        self,
        name: str,
        root: str,
        split: str,
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
    ):
        try:
            import datasets
        except ImportError as e:
            raise ImportError('Data sets of Hugging Face need datasets: pip install datasets') from e
        path = name.removeprefix('hfds/')
        asked, bracket, part = split.partition('[')
        try:
            self.split = resolve_split(asked, datasets.get_dataset_split_names(path), name) + bracket + part
            self.dataset = datasets.load_dataset(path, split=self.split, cache_dir=root or None)
        except (OSError, RuntimeError, ValueError) as e:
            raise ValueError(f'Expected images and masks in {name}, could not load its split {split}: {e}') from e
        self.title = name
        self.class_names = None
        self.image_column = self._find(input_key, IMAGE_COLUMNS, 'input_key')
        self.mask_column = self._find(target_key, MASK_COLUMNS, 'target_key')
        self.masks = self.dataset.select_columns([self.mask_column])

    def _find(self, key: Optional[str], usual: Sequence[str], option: str) -> str:
        features = self.dataset.features
        images = [column for column, feature in features.items() if type(feature).__name__ == 'Image']
        found = [column for column in ([key] if key else usual) if column in images]
        if not found:
            raise ValueError(
                f'Expected a column of images called {key or " or ".join(usual)} in {self.title}, which has images in '
                f'{images} among {list(features)}. Choose with {option}.'
            )
        return found[0]

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> Tuple[Image.Image, Image.Image]:
        row = self.dataset[index]
        return row[self.image_column], row[self.mask_column]

    def load_mask(self, index: int) -> Image.Image:
        return self.masks[index][self.mask_column]

    def name(self, index: int) -> str:
        return f'{self.title} {self.split}[{index}]'
