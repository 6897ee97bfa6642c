"""Finds the images that cannot be read before a run, so that every batch and every score has known images

An image that fails in the middle of a run has no good answer: another image in its place would count twice, and a batch
without it would be smaller than those of the other processes. Therefore all files are looked at once, at the start:
the header and the last bytes of each (--check-images files), or all of its pixels (pixels). Images that cannot be read
are left out of the data set, equally in all processes, before any order is drawn. One that fails later is an error.
"""

import copy
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Optional, Sized, Tuple, cast

import torch.distributed as dist
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from ...checks import shorten
from ...data.images import UnreadableImageError, check_regular, find_fault, name_of, open_in_reader, reason_of
from ...data.safetensors_reader import ReaderSafetensors
from ...distributed import process_index_and_count
from ..cli.settings import DataSettings

_logger = logging.getLogger(__name__)

_PER_TASK = 256  # images that a thread looks at in one go
_NUM_SHOWN = 10  # images that an error names


def find_readable(dataset: Dataset, settings: DataSettings, is_training: bool) -> Optional[List[int]]:
    """Find the images of a split that can be read, and log which cannot.

    All processes must call this together: each looks at its share of the images.

    Args:
        dataset: The split.
        settings: How thoroughly to look, and whether images may be left out of the validation.
        is_training: Whether the images are for training.

    Returns:
        Indices of the images to use, None if these are all, or if the data set cannot tell its files.

    Raises:
        ValueError: An image of the validation cannot be read, and is not to be left out. Or no image is left.
    """
    files = _Files.of(dataset)
    if files is None:
        if isinstance(dataset, IterableDataset) and (settings.skip_unreadable or settings.check_images == 'pixels'):
            _logger.warning('A stream cannot be looked at before the run: its images are not checked.')
        return None
    split = 'training' if is_training else 'validation'
    faults: Dict[int, str] = {}
    # the loader of NaFlex passes over images with a warning, so that none must be left that fails
    whole = (
        settings.check_images == 'pixels' or settings.naflex_loader or (settings.skip_unreadable and not is_training)
    )
    if whole or settings.check_images != 'none':
        faults = _find_faults(files, whole, split)
    named = [f'{files.name(index)} ({fault})' for index, fault in sorted(faults.items())]
    if named and not is_training and not settings.skip_unreadable:
        raise ValueError(
            f'Expected validation images that can be read, {len(named)} of {len(files)} cannot: '
            f'{shorten(named, _NUM_SHOWN)}. Replace or remove them, or leave them out of all scores with '
            '--skip-unreadable.'
        )
    if named and process_index_and_count()[0] == 0:
        left_out = 'the training' if is_training else 'all scores of the validation'
        _logger.warning(f'{len(named)} of {len(files)} {split} images cannot be read and are left out of {left_out}:')
        for name in named:
            _logger.warning(f'Left out: {name}')
    if not faults:
        return None
    readable = [index for index in range(len(files)) if index not in faults]
    if not readable:
        raise ValueError(f'Expected {split} images that can be read, all {len(files)} cannot. Check the files.')
    return readable


class _Files:
    """The files of a data set by index, of all its images or of those with the given indices."""

    def __init__(self, reader: Any, paths: Optional[List[str]] = None, indices: Optional[List[int]] = None):
        self.reader = reader
        self.paths = paths
        self.indices = indices

    @classmethod
    def of(cls, dataset: Any) -> Optional['_Files']:
        """The files of a data set, None if it has none that can be opened."""
        if isinstance(dataset, IterableDataset):
            return None
        indices = getattr(dataset, 'indices', None)
        if indices is not None:  # part of a data set
            files = cls.of(dataset.dataset)
            if files is None:
                return None
            return cls(files.reader, files.paths, [files.index_of(index) for index in indices])
        reader = getattr(dataset, 'reader', None)
        if reader is not None:
            if isinstance(reader, ReaderSafetensors):
                return None  # has pixels, not files
            reader = copy.copy(reader)
            # the loader processes would share an open tar file, and move its position under each other
            reader.cache_tarfiles = False
            return cls(reader)
        inner = getattr(dataset, 'dataset', None)  # of torchvision
        samples = getattr(inner, 'samples', None)
        if hasattr(inner, 'loader') and samples and isinstance(samples[0][0], (str, os.PathLike)):
            return cls(None, [str(path) for path, *_ in samples])
        return None

    def index_of(self, index: int) -> int:
        """Index in the whole data set of the image with this index."""
        return index if self.indices is None else self.indices[index]

    def __len__(self) -> int:
        whole = self.reader if self.paths is None else self.paths
        return len(cast(Sized, whole if self.indices is None else self.indices))

    def name(self, index: int) -> str:
        index = self.index_of(index)
        return name_of(self.reader, index) if self.paths is None else self.paths[index]

    def fault(self, index: int, whole: bool) -> Optional[str]:
        """Why this image cannot be read, None if it can."""
        index = self.index_of(index)
        try:
            if self.paths is not None:
                check_regular(self.paths[index])
            with open_in_reader(self.reader, index)[0] if self.paths is None else open(self.paths[index], 'rb') as file:
                return find_fault(file, whole)
        except (OSError, UnreadableImageError) as e:  # the file cannot be opened
            return reason_of(e)

    @property
    def are_paths(self) -> bool:
        """Whether the images have paths that are known without reading them, and can be opened by several threads."""
        return self.paths is not None or isinstance(self.reader, (ReaderImageFolder, ReaderImageInTar))

    @property
    def num_threads(self) -> int:
        """Reading waits for the disk, so that more threads than cores help."""
        return min(16, 2 * (os.cpu_count() or 1)) if self.are_paths else 1


def _find_faults(files: _Files, whole: bool, split: str) -> Dict[int, str]:
    """Reason of every image that cannot be read, found by all processes together, so that all have the same."""
    rank, num_processes = process_index_and_count()
    own = range(len(files))[rank::num_processes]

    def look(start: int) -> List[Tuple[int, str]]:
        looked = ((index, files.fault(index, whole)) for index in own[start : start + _PER_TASK])
        return [(index, fault) for index, fault in looked if fault is not None]

    with ThreadPoolExecutor(files.num_threads) as pool:
        tasks: Iterator[List[Tuple[int, str]]] = pool.map(look, range(0, len(own), _PER_TASK))
        title = f'Check {split} images'
        total = -(-len(own) // _PER_TASK)
        progress = tqdm(tasks, title, total, disable=None if rank == 0 else True, leave=False, dynamic_ncols=True)
        found = dict(pair for part in progress for pair in part)
    if num_processes > 1:
        parts: List[Any] = [None] * num_processes
        dist.all_gather_object(parts, found)
        found = {index: fault for part in parts for index, fault in part.items()}
    return found
