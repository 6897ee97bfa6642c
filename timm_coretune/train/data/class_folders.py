"""timm readers of folders and tar files with one folder per class, without what is no class

timm's own readers make classes of .ipynb_checkpoints and of images that lie in no class folder, follow symbolic links
that loop, and leave out folders that a class map does not name without a word.
"""

import logging
import os
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from timm.data.readers import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torchvision.datasets import ImageFolder

from ...listing import shorten

_logger = logging.getLogger(__name__)


class Classes(NamedTuple):
    """Which images belong to which class.

    Attributes:
        kept: Indices of the images that belong to a class.
        targets: Class index of each of these.
        class_to_idx: Class index by name.
    """

    kept: List[int]
    targets: List[int]
    class_to_idx: Dict[str, int]


def in_natural_order(names: Sequence[str]) -> List[str]:
    """Sort names as timm does. Names that differ only in the case of letters, which timm leaves in any order, too."""
    return sorted(sorted(names), key=natural_key)


def assign_classes(folders: Sequence[str], class_map: Optional[Dict[str, int]], where: str) -> Classes:
    """Assign images to classes by the names of their folders, and log which images belong to none.

    Args:
        folders: Name of the class folder of each image, '' for an image in none.
        class_map: Class index by name. When None, the names are numbered in natural order.
        where: The folder or file that was read, for messages.

    Raises:
        ValueError: No image belongs to a class.
    """
    counts = Counter(folders)
    loose = counts.pop('', 0)
    if loose:
        _logger.warning(f'{loose} image(s) directly in {where} are left out: they are in no class folder.')
    class_to_idx = class_map or {name: index for index, name in enumerate(in_natural_order(list(counts)))}
    unnamed = {name: count for name, count in counts.items() if name not in class_to_idx}
    if unnamed:
        _logger.warning(
            f'--class-map leaves out {sum(unnamed.values())} image(s) of {where}, in folders that it does not name: '
            f'{shorten(in_natural_order(list(unnamed)))}.'
        )
    kept = [index for index, name in enumerate(folders) if name in class_to_idx]
    if not kept:
        named = f', and --class-map names none of its folders {shorten(sorted(counts))}' if unnamed else ''
        raise ValueError(f'Expected images in one folder per class in {where}, found none{named}.')
    absent = sorted(set(class_to_idx) - set(counts))
    if class_map and absent:
        _logger.warning(f'--class-map names classes without images in {where}: {shorten(absent)}.')
    return Classes(kept, [class_to_idx[folders[index]] for index in kept], class_to_idx)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def subfolders(folder: str) -> List[str]:
    """Names of the folders in a folder, without hidden ones, in natural order."""
    with os.scandir(folder) as found:
        return in_natural_order([e.name for e in found if _is_folder(e) and not e.name.startswith('.')])


class _Scan:
    """Finds the images below a folder, and counts what is left out."""

    def __init__(self, types: Sequence[str]):
        self.types = tuple(types)
        self.hidden: List[str] = []
        self.loops: List[str] = []

    def images(self, folder: str, above: Tuple[str, ...] = ()) -> Iterator[str]:
        """The images below a folder. `above` are the real paths of the folders that were entered to get here."""
        entered = (*above, os.path.realpath(folder))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if _is_folder(entry):
                if entry.name.startswith('.'):
                    self.hidden.append(entry.path)
                elif entry.is_symlink() and _contains_one(os.path.realpath(entry.path), entered):
                    self.loops.append(entry.path)
                else:
                    yield from self.images(entry.path, entered)
            elif os.path.splitext(entry.name)[1].lower() in self.types:
                if entry.name.startswith('.'):
                    self.hidden.append(entry.path)
                else:
                    yield entry.path


def _contains_one(folder: str, paths: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(os.path.join(folder, '')) for path in paths)


def _log_hidden(hidden: Sequence[str], where: str) -> None:
    if hidden:
        _logger.info(f'{len(hidden)} hidden file(s) or folder(s) of {where} are left out: {shorten(hidden, 3)}.')


def _log_scan(scan: _Scan, where: str) -> None:
    _log_hidden(scan.hidden, where)
    for path in scan.loops:
        _logger.warning(f'The symbolic link {path} leads to a folder that it lies in. It is not followed.')


class ReaderClassFolders(ReaderImageFolder):
    """Reads images in folders, whose names are the classes. Subfolders are read too; the innermost name counts.

    Args:
        root: Folder that holds the class folders.
        class_map: Class index by name of the folder. When None, the folders are numbered in natural order.
        types: Endings of image files. When None, those of timm.

    Raises:
        ValueError: There are no images in class folders.
    """

    def __init__(self, root: str, class_map: Optional[Dict[str, int]] = None, types: Optional[Sequence[str]] = None):
        Reader.__init__(self)
        self.root = root = os.path.normpath(root)
        scan = _Scan(types or get_img_extensions())
        paths = in_natural_order(list(scan.images(root)))
        _log_scan(scan, root)
        if not paths:
            raise ValueError(
                f'Expected images in one folder per class in {root!r}, found none with the endings '
                f'{", ".join(scan.types)}. Several splits are folders such as train/ and validation/ above the class '
                'folders. Check --data-dir.'
            )
        folders = [os.path.dirname(path) for path in paths]
        names = ['' if folder == root else os.path.basename(folder) for folder in folders]
        kept, targets, self.class_to_idx = assign_classes(names, class_map, root)
        self.samples = [(paths[index], target) for index, target in zip(kept, targets, strict=True)]


class TorchvisionClassFolders(ImageFolder):
    """torchvision's ImageFolder, without hidden classes and images, and without links that loop."""

    def find_classes(self, directory: Any) -> Tuple[List[str], Dict[str, int]]:
        classes, _ = super().find_classes(directory)
        _log_hidden([name for name in classes if name.startswith('.')], str(directory))
        classes = [name for name in classes if not name.startswith('.')]
        return classes, {name: index for index, name in enumerate(classes)}

    @staticmethod
    def make_dataset(
        directory: Any, class_to_idx: Dict[str, int], extensions: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        scan = _Scan(extensions)
        samples = []
        for name, index in sorted(class_to_idx.items()):
            paths = list(scan.images(os.path.join(directory, name), (os.path.realpath(directory),)))
            if not paths:
                raise FileNotFoundError(f'the class {name} has no images in {directory}.')
            samples += [(path, index) for path in sorted(paths, key=os.path.split)]
        _log_scan(scan, str(directory))
        return samples


class ReaderClassTar(ReaderImageInTar):
    """Reads images in a tar file, or a tar file of tar files, whose folders are the classes.

    Args:
        root: The tar file.
        class_map: Class index by name of the folder. When None, the folders are numbered in natural order.

    Raises:
        ValueError: There are no images in class folders.
    """

    def __init__(self, root: str, class_map: Optional[Dict[str, int]] = None):
        try:
            super().__init__(root)
        except ValueError as e:  # timm's reader cannot unpack an empty list
            raise ValueError(f'Expected images in one folder per class in {root!r}, could not read any: {e}.') from e
        self.paths = [_member_path(sample) for sample in self.samples]
        hidden = [str(path) for path in self.paths if any(part.startswith('.') for part in path.parts)]
        _log_hidden(hidden, root)
        visible = [i for i, path in enumerate(self.paths) if not any(part.startswith('.') for part in path.parts)]
        kept, targets, self.class_name_to_idx = assign_classes(
            [self.paths[i].parent.name for i in visible], class_map, root
        )
        chosen = [visible[index] for index in kept]
        self.paths = [self.paths[index] for index in chosen]
        self.samples, self.targets = self.samples[chosen], np.array(targets)
        self.class_idx_to_name = {index: name for name, index in self.class_name_to_idx.items()}

    def top_folders(self) -> List[str]:
        """The outermost folder of each image, '' unless a class folder lies in it.

        A folder that holds all others does not count.
        """
        parts = [path.parts for path in self.paths]
        while len({part[0] for part in parts}) == 1 and all(len(part) > 3 for part in parts):
            parts = [part[1:] for part in parts]
        return [part[0] if len(part) > 2 else '' for part in parts]


def _member_path(sample: np.ndarray) -> PurePosixPath:
    info, _, inner_tar = sample
    path = PurePosixPath(*[part for part in PurePosixPath(info.path).parts if part not in ('.', '/')])
    return path if inner_tar is None else PurePosixPath(inner_tar.name).with_suffix('') / path
