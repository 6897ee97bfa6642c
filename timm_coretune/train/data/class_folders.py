"""timm readers of folders and tar files with one folder per class, without what is no class

timm's own readers make classes of .ipynb_checkpoints and of images that lie in no class folder, follow symbolic links
that loop, and leave out folders that a class map does not name without a word.
"""

import logging
import os
import tarfile
import zlib
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from timm.data.readers import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, extract_tarinfos
from timm.utils.misc import natural_key
from torchvision.datasets import ImageFolder

from ...checks import shorten
from ...data.images import IMAGE_ENDINGS, is_other_image

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


def check_merged(folders: Sequence[str], where: str) -> None:
    """Warn if a class is made of several folders of one name, or raise a ValueError if all images come together so.

    Args:
        folders: Folder of each image that belongs to a class. The innermost name is that of the class.
        where: The folder or file that was read, for messages.
    """
    folders_of: Dict[str, List[str]] = {}
    counts = Counter(folders)
    for folder in in_natural_order(list(counts)):
        folders_of.setdefault(os.path.basename(folder), []).append(folder)
    merged = {name: alike for name, alike in folders_of.items() if len(alike) > 1}
    if not merged:
        return
    name, alike = next(iter(merged.items()))
    shown = shorten([f'{folder} ({counts[folder]})' for folder in alike])
    rule = (
        'The innermost folder names the class. If the outermost one is to name it, move the images up into it, or give '
        '--dataset torch/image_folder'
    )
    if len(folders_of) == 1:
        raise ValueError(
            f'Expected one folder per class in {where}, found {len(folders)} images in {len(alike)} folders that are '
            f'all called {name!r}, which would be one class: {shown}. {rule}.'
        )
    others = f', and so are {len(merged) - 1} more' if len(merged) > 1 else ''
    _logger.warning(
        f'SEVERAL FOLDERS OF {where} ARE ONE CLASS: {name!r} is made of {shown}{others}. {rule}; splits are named by '
        '--train-split and --val-split.'
    )


def _log_other_files(endings: 'Counter[str]', where: str) -> None:
    """Log how many files are left out as their endings are none of images, as a warning if they may be images."""
    if not endings:
        return
    most_first = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    shown = shorten([f'{ending or "no ending"} ({count})' for ending, count in most_first])
    may_be_images = any(map(is_other_image, endings))
    hint = ' Convert them to JPEG, PNG or WebP to use them.' if may_be_images else ''
    _logger.log(
        logging.WARNING if may_be_images else logging.INFO,
        f'{endings.total()} file(s) of {where} are left out, as their endings are none of images that are read: '
        f'{shown}.{hint}',
    )


def image_endings() -> Tuple[str, ...]:
    """Endings of the files that are read as images: our own, and those that were added to timm's list."""
    return tuple(dict.fromkeys((*get_img_extensions(), *IMAGE_ENDINGS)))


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
        self.others: Counter[str] = Counter()  # endings of files that are no images

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
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if ending not in self.types:
                self.others[ending] += not entry.name.startswith('.')
            elif entry.name.startswith('.'):
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
    _log_other_files(+scan.others, where)
    for path in scan.loops:
        _logger.warning(f'The symbolic link {path} leads to a folder that it lies in. It is not followed.')


class ReaderClassFolders(ReaderImageFolder):
    """Reads images in folders, whose names are the classes. Subfolders are read too; the innermost name counts.

    Args:
        root: Folder that holds the class folders.
        class_map: Class index by name of the folder. When None, the folders are numbered in natural order.
        types: Endings of image files. When None, `image_endings()`.

    Raises:
        ValueError: There are no images in class folders.
    """

    def __init__(self, root: str, class_map: Optional[Dict[str, int]] = None, types: Optional[Sequence[str]] = None):
        Reader.__init__(self)
        self.root = root = os.path.normpath(root)
        scan = _Scan(types or image_endings())
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
        check_merged([os.path.relpath(folders[index], root) for index in kept], root)
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
        scan = _Scan(image_endings())
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
        Reader.__init__(self)
        self.root, self.root_is_tar, self.cache_tarfiles = root, True, True
        endings = image_endings()
        _log_other_files(_other_files_of(root, endings), root)
        try:
            self.samples, _, _, tarfiles = extract_tarinfos(root, extensions=endings)
        except ValueError as e:  # timm cannot unpack an empty list
            raise ValueError(
                f'Expected images in one folder per class in {root!r}, found none with the endings '
                f'{", ".join(endings)}.'
            ) from e
        self.tar_state = tarfiles[0][1]
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


def _other_files_of(root: str, endings: Sequence[str]) -> 'Counter[str]':
    """Count the files of a tar file that have none of these endings and are not hidden, by their endings.

    Raises:
        ValueError: The file is no tar file, or is cut.
    """
    others: Counter[str] = Counter()

    def count(archive: tarfile.TarFile) -> None:
        for info in archive:
            path = PurePosixPath(info.name)
            ending = path.suffix.lower()
            if not info.isfile() or any(part.startswith('.') for part in path.parts if part != '.'):
                continue
            if ending == '.tar':
                with tarfile.open(fileobj=archive.extractfile(info), mode='r:') as inner:
                    count(inner)
            else:
                others[ending] += ending not in endings

    try:
        with tarfile.open(root, 'r:') as archive:
            count(archive)
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise ValueError(f'Expected a whole tar file in {root!r}, could not read it: {e}. Get it again.') from e
    return +others


def _member_path(sample: np.ndarray) -> PurePosixPath:
    info, _, inner_tar = sample
    path = PurePosixPath(*[part for part in PurePosixPath(info.path).parts if part not in ('.', '/')])
    return path if inner_tar is None else PurePosixPath(inner_tar.name).with_suffix('') / path
