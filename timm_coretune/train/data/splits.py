"""Chooses the splits of a data set to train and to validate on, and makes sure that they have no image in common

timm looks for a split itself, and takes the whole data if it finds none. Here a split that was asked for must be there.
"""

import logging
import os
from typing import Any, Dict, Hashable, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from torch.utils.data import Dataset, IterableDataset

from ...checks import shorten
from ..cli.settings import DataSettings
from .class_folders import ReaderClassTar, subfolders
from .fields import check_fields

_logger = logging.getLogger(__name__)

# The defaults of --train-split and --val-split stand for any of these names. timm knows all but dev and test.
TRAIN_NAMES = ('train', 'training')
VALIDATION_NAMES = ('validation', 'val', 'valid', 'dev', 'eval', 'evaluation')
TEST_NAMES = ('test', 'testing')
_USUAL_NAMES = (*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES)
HELD_OUT = 0.1  # share of the training images that is held out if there is no validation split
# data sets of torchvision that have training and test images only; timm takes any other name for the latter
_TRAIN_AND_TEST = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')


class Splits(NamedTuple):
    """The splits of a run.

    Attributes:
        train: Name of the split to train on, '' for data that has no splits.
        validation: Name of the split to validate on, None for no such split.
        held_out: Share of each class of the training split to hold out for validation, 0 for none.
    """

    train: str
    validation: Optional[str]
    held_out: float = 0.0

    @property
    def validated_on(self) -> str:
        """What is validated on, in a word or two, '' for nothing."""
        return f'held-out ({100 * self.held_out:g} %)' if self.held_out else self.validation or ''


def _find(names: Sequence[str], available: Sequence[str]) -> Optional[str]:
    """The first of these names that is available, in any case of letters."""
    for name in names:
        if name in available:
            return name
        same = [other for other in available if other.lower() == name]
        if same:
            return same[0]
    return None


def _missing(flag: str, split: str, available: Sequence[str], where: str) -> ValueError:
    there = f'has {shorten(available, 10)}' if available else 'has no splits'
    return ValueError(f'Expected the split {split!r} of {flag} in {where}, which {there}. Choose one of what is there.')


def choose_splits(
    settings: DataSettings,
    available: Sequence[str],
    where: str,
    with_training: bool = True,
    usual: Optional[Sequence[str]] = None,
    may_be_whole: bool = False,
) -> Splits:
    """Choose the splits to train and to validate on.

    A split whose name is not the default must be there. The default of --train-split stands for the usual names of a
    training split, or the whole data if it has no splits; that of --val-split for the usual names of a validation
    split, else a test split. If there is none, training images are held out.

    Args:
        settings: The names that were asked for.
        available: Names of the splits, or of all that can be named as one.
        where: The data, for messages.
        with_training: Whether anything is trained.
        usual: Those of the available names that a default may stand for. When None, all.
        may_be_whole: Whether data without splits is one whole, as folders and tar files of classes are.

    Raises:
        ValueError: A split is not there.
    """
    usual = [name for name in (available if usual is None else usual) if name.lower() in _USUAL_NAMES]
    defaults = DataSettings()
    train: Optional[str] = settings.train_split
    if train == defaults.train_split:
        train = _find(TRAIN_NAMES, usual)
    elif train not in available:
        train = None
    validation: Optional[str] = settings.val_split or None
    held_out = settings.val_fraction or 0.0
    if held_out:
        validation = None
    elif validation == defaults.val_split:
        others = [name for name in usual if name != train] if with_training else usual
        validation = _find(VALIDATION_NAMES, others) or _choose_test(others, where, with_training)
        held_out = 0.0 if validation else HELD_OUT
    elif validation is not None and validation not in available:
        raise _missing('--val-split', validation, available, where)
    is_whole = may_be_whole and settings.train_split == defaults.train_split and not usual
    if train is None and not is_whole and (with_training or held_out):
        raise _missing('--train-split', settings.train_split, available, where)
    if validation is not None and validation != settings.val_split:
        _logger.info(f'Validation on the split {validation!r} of {where}.')
    return Splits(train or '', validation, held_out)


def _choose_test(usual: Sequence[str], where: str, with_training: bool) -> Optional[str]:
    test = _find(TEST_NAMES, usual)
    if test and with_training:
        _logger.warning(
            f'{where} has no validation split, so {test!r} is validated on: the best epoch is chosen on test images, '
            'and its score is too good. --val-fraction 0.1 holds out training images for that instead.'
        )
    return test


def splits_of_folder(root: str, settings: DataSettings, with_training: bool = True) -> Splits:
    """Choose the splits of a folder. A split is a subfolder; usual names need class folders in it.

    Raises:
        ValueError: A split is not there.
    """
    folders = subfolders(root)
    named = [s for s in (settings.train_split, settings.val_split) if s and os.path.isdir(os.path.join(root, s))]
    candidates = [name for name in folders if name.lower() in _USUAL_NAMES]
    usual = [name for name in candidates if subfolders(os.path.join(root, name))]
    if candidates and not usual and len(candidates) == len(folders):
        raise ValueError(
            f'Expected images in one folder per class in {shorten(candidates)} of {root}, found no folders there. A '
            'split is a folder of class folders.'
        )
    if usual and len(usual) < len(candidates):
        left = shorten([name for name in candidates if name not in usual])
        _logger.info(f'No class folders are in {left} of {root}, so it is no split.')
    # a path such as images/train may be named too
    available = [*folders, *(name for name in named if name not in folders)]
    splits = choose_splits(settings, available, root, with_training, usual, may_be_whole=True)
    if not splits.train and splits.held_out:
        _warn_of_likely_splits(root, folders)
    return splits


def _warn_of_likely_splits(root: str, folders: Sequence[str]) -> None:
    """Warn if folders that are read as one whole look like splits: the same class folders are in several of them."""
    tops: Dict[Tuple[str, ...], List[str]] = {}
    for name in folders:
        inner = tuple(subfolders(os.path.join(root, name)))
        if inner:
            tops.setdefault(inner, []).append(name)
    alike = max(tops.values(), key=len, default=[])
    if len(alike) > 1:
        _logger.warning(
            f'{shorten(alike)} of {root} have the same class folders, and are read as one. If they are splits, name '
            'them as --train-split and --val-split.'
        )


def splits_of_torchvision(name: str, settings: DataSettings, with_training: bool = True) -> Splits:
    """Choose the splits of a data set of torchvision, which has its own names for them.

    Raises:
        ValueError: The data set has training and test images only, and a split has another name.
    """
    if name not in _TRAIN_AND_TEST:
        return splits_by_name(settings)
    for flag, split in (('--train-split', settings.train_split), ('--val-split', settings.val_split)):
        if split and split not in _USUAL_NAMES:
            raise _missing(flag, split, ('train', 'test'), f'torch/{name}')
    for_validation = settings.val_split if settings.val_split in TRAIN_NAMES else 'test'
    if settings.val_fraction:
        return Splits(settings.train_split, None, settings.val_fraction)
    if settings.val_split == DataSettings().val_split:
        _choose_test(['test'], f'torch/{name}', with_training)
    train = 'train' if settings.train_split in TRAIN_NAMES else 'test'
    return Splits(train, for_validation if settings.val_split else None)


def splits_of_hfds(settings: DataSettings, with_training: bool = True) -> Splits:
    """Choose the splits of a data set of Hugging Face. A part such as train[:80%] may be named.

    Raises:
        ValueError: A split is not there.
    """
    import datasets

    name = settings.dataset.partition('/')[2]
    remote = {'trust_remote_code': True} if settings.dataset_trust_remote_code else {}
    if settings.dataset.lower().startswith('hfids/'):  # a stream, of which nothing is downloaded
        whole = datasets.get_dataset_split_names(name, **remote)
    else:
        loaded = datasets.load_dataset(name, cache_dir=settings.data_dir, **remote)
        whole = list(loaded)
        if whole:  # timm adds an empty column of images if there is none
            check_fields(loaded[whole[0]].features, settings)
    asked = (settings.train_split, settings.val_split)
    named = [split for split in asked if all(part.partition('[')[0] in whole for part in split.split('+'))]
    return choose_splits(settings, [*whole, *named], settings.dataset, with_training, usual=whole)


def splits_by_name(settings: DataSettings) -> Splits:
    """The splits as they were named, of a data set that reports a wrong name itself."""
    if settings.val_fraction:
        return Splits(settings.train_split, None, settings.val_fraction)
    return Splits(settings.train_split, settings.val_split or None)


def _identities(dataset: Any) -> Optional[Iterator[Hashable]]:
    """What tells the images of a data set apart, one by one, None if they cannot be told apart."""
    indices = getattr(dataset, 'indices', None)
    if isinstance(dataset, IterableDataset):
        return None
    if indices is not None:  # part of a data set
        whole = _identities(dataset.dataset)
        if whole is None:
            return None
        listed = list(whole)
        return (listed[index] for index in indices)
    if not hasattr(dataset, 'reader') and hasattr(dataset, 'dataset'):
        return _identities(dataset.dataset)
    reader = getattr(dataset, 'reader', dataset)
    if isinstance(reader, ReaderClassTar):
        return ((reader.root, str(path)) for path in reader.paths)
    samples = getattr(reader, 'samples', None)
    if isinstance(samples, list) and all(isinstance(sample[0], str) for sample in samples[:1]):
        return real_paths([sample[0] for sample in samples])
    split = getattr(reader, 'split', None)
    return None if split is None else _rows_of(str(split), reader)


def _rows_of(split: str, reader: Any) -> Iterator[Hashable]:
    """The rows of a split, by its name and their number. A slice as in train[80%:] of hfds/ is of the whole split."""
    if '[' not in split and '+' not in split:
        return ((split, index) for index in range(len(reader)))
    from datasets import ReadInstruction

    lengths = {name: info.num_examples for name, info in reader.dataset.info.splits.items()}
    slices = ReadInstruction.from_spec(split).to_absolute(lengths)
    return (
        (part.splitname, index)
        for part in slices
        for index in range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
    )


def real_paths(paths: Sequence[str]) -> Iterator[str]:
    """Paths with all symbolic links resolved."""
    folders: dict = {}
    for path in paths:
        if os.path.islink(path):
            yield os.path.realpath(path)
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        yield os.path.join(folders[folder], name)


def check_apart(train: Dataset, validation: Dataset) -> None:
    """Raise a ValueError if an image is in both splits, as far as the data sets can tell their images apart."""
    of_train, of_validation = _identities(train), _identities(validation)
    if of_train is not None and of_validation is not None:
        check_disjoint(of_train, of_validation)


def check_disjoint(of_train: Iterable[Hashable], of_validation: Iterable[Hashable]) -> None:
    """Raise a ValueError if what tells images apart, such as their files, is the same for images of both splits."""
    among = set(of_validation)
    common = [identity for identity in of_train if identity in among]
    if common:
        raise ValueError(
            f'Expected training and validation images that are not the same, {len(common)} of the {len(among)} '
            f'validation images are trained on, such as {common[0]}. Check --train-split, --val-split and symbolic '
            "links; --val-split '' validates nothing."
        )
