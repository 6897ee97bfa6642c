"""A table of images: a CSV or Parquet file with a row for each, of its path, its label and perhaps its split"""

import logging
import os
import re
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.targets import multi_field_target, parse_target_keys
from torch.utils.data import Dataset

from ...checks import shorten
from ...data.columns import read_columns, read_names
from ...data.images import IMAGE_ENDINGS, LabelledImages
from ..cli.settings import DataSettings
from .class_folders import in_natural_order
from .splits import Splits, choose_splits

_logger = logging.getLogger(__name__)

# names of columns in lower case, the first that is there counts
IMAGE_COLUMNS = ('image', 'path', 'file', 'filename', 'file_name', 'image_path', 'file_path', 'filepath')
LABEL_COLUMNS = ('label', 'class', 'target', 'labels', 'class_name', 'category')
SPLIT_COLUMNS = ('split', 'subset')
SEPARATOR = '|'  # between several labels of an image in one value


class _Row(NamedTuple):
    image: str
    label: Any  # an index, a name, or a list of indices
    split: str


class ReaderTable(ReaderImageFolder):
    """Reads the images of some rows of a table.

    Args:
        root: Folder of the table.
        samples: Path and label of each image.
        class_to_idx: Class index by name, empty if the labels are strings or nameless indices.
    """

    def __init__(self, root: str, samples: List[Tuple[str, Any]], class_to_idx: Dict[str, int]):
        Reader.__init__(self)
        self.root, self.samples, self.class_to_idx = root, samples, class_to_idx


class LabelTable:
    """The rows of a table, of which a reader takes those of a split.

    Args:
        path: File with the ending .csv, .tsv or .parquet.
        settings: The columns of the image and the label, None for usual names, and whether images have several labels.
        class_map: Class index by label. When None, labels that are integers are indices, others are names.

    Raises:
        ValueError: The file cannot be read, or has not the columns.
    """

    def __init__(self, path: str, settings: DataSettings, class_map: Optional[Dict[str, int]] = None):
        self.path, self.root = path, os.path.dirname(path) or '.'
        self.several, self.class_to_idx = settings.is_multi_label, class_map or {}
        names = read_names(path)
        image = self._find(names, settings.input_key, IMAGE_COLUMNS, '--input-key', 'the paths of the images')
        targets = parse_target_keys(settings.target_key) or (
            self._find(names, settings.target_key, LABEL_COLUMNS, '--target-key', 'the labels'),
        )
        missing = [name for name in targets if name not in names]
        if missing:
            raise ValueError(
                f'Expected the columns --target-key {settings.target_key} in {path!r}, which has {shorten(names, 20)}.'
            )
        split = next((name for usual in SPLIT_COLUMNS for name in names if name.lower() == usual), None)
        chosen = list(dict.fromkeys([image, *targets, *([split] if split else [])]))
        _logger.info(
            f'{path}: images from the column {image!r}, labels from {shorten([repr(name) for name in targets])}'
            + (f', splits from {split!r}.' if split else ', no column of splits.')
        )
        columns = read_columns(path, chosen)
        if len(targets) > 1 and class_map is not None:
            raise ValueError('Expected no --class-map with several columns in --target-key: each column is a class.')
        if len(targets) > 1:
            labels: Sequence[Any] = self._of_several_columns(columns, targets)
        else:
            labels = self._of_one_column(columns[targets[0]], settings, class_map)
        splits = [str(value or '').strip() for value in columns[split]] if split else [''] * len(labels)
        self.rows = [_Row(*row) for row in zip(columns[image], labels, splits, strict=True)]
        self.splits = in_natural_order(list({*splits} - {''}))
        if split and '' in splits:
            _logger.warning(f'{splits.count("")} row(s) of {path} have no split, and are left out.')

    def _find(self, names: List[str], asked: Optional[str], usual: Sequence[str], flag: str, what: str) -> str:
        """The column that was asked for, or else the first with a usual name."""
        if asked:
            found = [name for name in names if name == asked]
        else:
            found = [name for word in usual for name in names if name.lower() == word]
        if found:
            return found[0]
        if any(name.lower().endswith(IMAGE_ENDINGS) for name in names):
            raise ValueError(
                f'Expected the names of the columns in the first line of {self.path!r}, it looks like an image: '
                f'{shorten(names)}. Write a line above it, such as image,label.'
            )
        expected = f'the column {flag} {asked}' if asked else f'a column called {", ".join(usual[:-1])} or {usual[-1]}'
        raise ValueError(
            f'Expected {expected} in {self.path!r}, with {what}; it has {shorten(names, 20)}. Name one by {flag}.'
        )

    def _of_several_columns(self, columns: Dict[str, List[Any]], targets: Sequence[str]) -> List[List[int]]:
        """Classes of each image: the columns whose value is above 0."""
        self.class_to_idx = {name: index for index, name in enumerate(targets)}
        rows = zip(*(columns[name] for name in targets), strict=True)
        try:
            return [multi_field_target(dict(zip(targets, map(float, row), strict=True)), targets) for row in rows]
        except (ValueError, TypeError) as e:
            raise ValueError(f'Expected 0 or 1 in the columns {shorten(targets)} of {self.path!r}: {e}.') from e

    def _of_one_column(
        self, values: List[Any], settings: DataSettings, class_map: Optional[Dict[str, int]]
    ) -> Sequence[Any]:
        if not self.several:
            labels = _as_indices(values)
            return labels if class_map is None else [self._by_map(label, class_map) for label in labels]
        lists = [value.split(SEPARATOR) if isinstance(value, str) and value else value or [] for value in values]
        if any(not isinstance(value, list) for value in lists):
            return values  # of which an error tells that lists are expected
        flat = _as_indices([label for value in lists for label in value])
        if class_map is None and flat and settings.target_format != 'multihot' and all(type(x) is str for x in flat):
            class_map = {name: index for index, name in enumerate(in_natural_order(list({*flat})))}
        self.class_to_idx = class_map or {}
        left = iter(flat if class_map is None else [self._by_map(label, class_map) for label in flat])
        return [[next(left) for _ in value] for value in lists]

    def _by_map(self, label: Any, class_map: Dict[str, int]) -> Any:
        if _is_missing(label):
            return label
        if str(label) not in class_map:
            raise ValueError(f'Expected all labels of {self.path!r} in --class-map, it has no {str(label)!r}.')
        return class_map[str(label)]

    def reader(self, split: str) -> ReaderTable:
        """A reader of the images of a split, '' for all.

        Raises:
            ValueError: A row has no image or label, an image has two labels, or no image is there.
        """
        where = f'{self.path!r} ({split})' if split else repr(self.path)
        rows = [row for row in self.rows if row.split == split] if split else self.rows
        unnamed = [number for number, row in enumerate(rows, 1) if not row.image or not isinstance(row.image, str)]
        if unnamed:
            raise ValueError(
                f'Expected a path in each row of {where}, {len(unnamed)} of {len(rows)} have none, such as row '
                f'{unnamed[0]}: {str(rows[unnamed[0] - 1].image)[:80]!r}. Images inside of Parquet files are read by '
                '--dataset hfds/FOLDER.'
            )
        unlabelled = [row.image for row in rows if not self.several and _is_missing(row.label)]
        if unlabelled:
            raise ValueError(
                f'Expected a label in each row of {where}, {len(unlabelled)} of {len(rows)} have none: '
                f'{shorten(unlabelled)}. Remove these rows, or name the column of the labels by --target-key.'
            )
        samples = self._once(rows, where)
        if not any(os.path.exists(path) for path, _ in samples):
            shown = f', such as {samples[0][0]!r}' if samples else ''
            raise ValueError(
                f'Expected images at the paths of {where}, none of {len(samples)} is there{shown}. Paths start at the '
                'folder of the table: move it, or write absolute paths.'
            )
        return ReaderTable(self.root, samples, self.class_to_idx)

    def _once(self, rows: Sequence[_Row], where: str) -> List[Tuple[str, Any]]:
        """Path and label of each image, once."""
        label_of: Dict[str, Any] = {}
        conflicts: Counter[str] = Counter()
        for row in rows:
            path = os.path.normpath(os.path.join(self.root, row.image))
            if label_of.setdefault(path, row.label) != row.label:
                conflicts[path] += 1
        if conflicts:
            raise ValueError(
                f'Expected one label for each image in {where}, {len(conflicts)} have several: '
                f'{shorten(list(conflicts))}. Correct these rows. With --task multilabel one row has all labels of an '
                f'image, as a{SEPARATOR}b.'
            )
        if len(label_of) < len(rows):
            _logger.warning(f'{len(rows) - len(label_of)} row(s) of {where} repeat an image. Each is taken once.')
        return list(label_of.items())


def open_table(
    path: str,
    settings: DataSettings,
    with_training: bool,
    class_map: Optional[Dict[str, int]],
    img_mode: str,
) -> Tuple[Splits, Callable[[str, bool], Dataset]]:
    """Choose the splits of a table. Returns them with a function that opens one."""
    table = LabelTable(path, settings, class_map)
    splits = choose_splits(settings, table.splits, path, with_training, may_be_whole=not table.splits)
    return splits, lambda split, _: LabelledImages(path, table.reader(split), input_img_mode=img_mode)


def _is_missing(value: Any) -> bool:
    return value is None or value == '' or (isinstance(value, float) and value != value)


def _as_indices(values: Sequence[Any]) -> Sequence[Any]:
    """Strings as integers, if all that are not empty are plain integers: a CSV file has strings only."""
    found = [value for value in values if not _is_missing(value)]
    if not all(isinstance(value, str) and re.fullmatch('0|-?[1-9][0-9]{0,8}', value) for value in found):
        return values
    return [value if _is_missing(value) else int(value) for value in values]
