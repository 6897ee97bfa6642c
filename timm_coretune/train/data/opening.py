"""Finds the splits of folders, files and named data sets, and opens them through timm and torchvision"""

import functools
import importlib.util
import os
from typing import Any, Callable, Tuple, cast

from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset

from ...data.columns import is_table
from ...data.images import ImageStream, LabelledImages
from ...data.safetensors_images import find_splits as splits_of_safetensors
from ...data.safetensors_reader import ReaderSafetensors
from ..cli.settings import DataSettings
from .class_folders import (
    ReaderClassFolders,
    ReaderClassTar,
    TorchvisionClassFolders,
    check_merged,
    in_natural_order,
)
from .classes import read_class_map
from .fields import check_stream
from .labelled import ConvertedImages, LabelledSubset
from .splits import (
    Splits,
    choose_splits,
    splits_by_name,
    splits_of_folder,
    splits_of_hfds,
    splits_of_torchvision,
)
from .table import open_table

_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'tfds': 'tensorflow_datasets', 'wds': 'webdataset'}


def _check_installed(kind: str) -> None:
    """Raise an ImportError if the package that reads a kind of data sets is not there. timm would end the process."""
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ImportError(f'Data sets of {kind}/ need {package}: pip install {package.replace("_", "-")}')


def _create_with_timm(settings: DataSettings, root: str, split: str, is_training: bool, **options: Any) -> Dataset:
    img_mode = get_img_mode(settings)
    try:
        dataset = cast(Any, create_dataset)(
            settings.dataset,
            root=root or settings.data_dir,
            split=split,
            search_split=False,
            is_training=is_training,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            repeats=settings.epoch_repeats if is_training else 0,
            input_img_mode=img_mode,
            input_key=settings.input_key,
            target_key=settings.target_key,
            target_format='multihot' if settings.target_format == 'multihot' else None,
            num_samples=settings.train_num_samples if is_training else settings.val_num_samples,
            trust_remote_code=settings.dataset_trust_remote_code,
            **options,
        )
    except (RuntimeError, AssertionError, FileNotFoundError, ValueError) as e:
        raise ValueError(f'Expected images of the split {split!r} of {settings.dataset} in {root!r}: {e}') from e
    check_stream(getattr(dataset, 'reader', None), settings)
    return _open_by_our_rules(dataset, img_mode)


def _open_by_our_rules(dataset: Any, img_mode: str) -> Dataset:
    """The same data set, which opens images as data/images.py does."""
    if isinstance(dataset, VisionDataset):
        return ConvertedImages(dataset, img_mode)
    if isinstance(dataset, ImageDataset):
        return LabelledImages(None, reader=dataset.reader, input_img_mode=img_mode)
    if isinstance(dataset, IterableImageDataset) and type(dataset.reader).__name__ != 'ReaderTfds':
        return ImageStream(dataset.reader, img_mode)  # TensorFlow decodes its images itself
    return dataset


def _open_with_torchvision(root: str, img_mode: str) -> Dataset:
    try:
        return ConvertedImages(TorchvisionClassFolders(root), img_mode)
    except FileNotFoundError as e:
        raise ValueError(f'Expected images in one folder per class in {root!r}: {e}') from e


Open = Callable[[str, bool], Dataset]  # opens the split of this name, to be trained on or not


def find_splits(settings: DataSettings, with_training: bool, seed: int) -> Tuple[Splits, Open]:
    """Choose the splits. Returns them with a function that opens one."""
    root, img_mode = settings.data_dir or '', get_img_mode(settings)
    kind, _, name = settings.dataset.partition('/')
    kind = kind.lower() if name else ''
    if settings.class_map and (kind == 'torch' or root.endswith('.safetensors')):
        raise ValueError('Expected --class-map with folders, a tar file or records: this data set has its own indices.')
    class_map = read_class_map(settings.class_map, root)
    if kind in ('torch', *_PACKAGES):
        _check_installed(kind)
        with_timm = functools.partial(_create_with_timm, settings, class_map=class_map, seed=seed)
        if name.lower() in ('image_folder', 'folder'):
            _check_exists(root)
            splits = splits_of_folder(root, settings, with_training)
            return splits, lambda split, _: _open_with_torchvision(os.path.join(root, split), img_mode)
        if kind in ('hfds', 'hfids'):
            splits = splits_of_hfds(settings, with_training)
        elif kind == 'torch':
            splits = splits_of_torchvision(name.lower(), settings, with_training)
        else:
            splits = splits_by_name(settings)
        return splits, functools.partial(with_timm, root)
    _check_exists(root)
    if root.endswith('.safetensors'):
        splits = choose_splits(settings, splits_of_safetensors(root), root, with_training)
        return splits, lambda split, _: LabelledImages(root, ReaderSafetensors(root, split), input_img_mode=img_mode)
    if settings.train_num_samples or settings.val_num_samples:
        raise ValueError('Expected --train-num-samples and --val-num-samples with records or streams.')
    if is_table(root) and os.path.isfile(root):
        return open_table(root, settings, with_training, class_map, img_mode)
    if settings.target_key:
        raise ValueError('Expected --target-key with a table, records or streams.')
    if settings.is_multi_label:
        raise ValueError(
            f'Expected images with several labels in {root!r}, in a folder or tar file each has one, its class. Give a '
            'table, a data set of records as --dataset, such as hfds/, or a safetensors file.'
        )
    if os.path.isdir(root):
        types = settings.input_key.split(';') if settings.input_key else None
        return splits_of_folder(root, settings, with_training), lambda split, _: LabelledImages(
            root, ReaderClassFolders(os.path.join(root, split), class_map, types), input_img_mode=img_mode
        )
    if not root.endswith('.tar'):
        raise ValueError(f'Expected a folder, a .csv, .parquet, .tar or .safetensors file in --data-dir, got {root!r}.')
    reader = ReaderClassTar(root, class_map)
    tops = reader.top_folders()
    splits = choose_splits(settings, in_natural_order(list({*tops} - {''})), root, with_training, may_be_whole=True)

    def open_members(split: str, _: bool) -> Dataset:
        whole = LabelledImages(root, reader, input_img_mode=img_mode)
        indices = [i for i, top in enumerate(tops) if top == split or not split]
        check_merged([str(reader.paths[i].parent) for i in indices], os.path.join(root, split))
        return LabelledSubset(whole, indices) if split else whole

    return splits, open_members


def _check_exists(root: str) -> None:
    if not os.path.exists(root):
        raise ValueError(f'Expected images in --data-dir {root!r}, which does not exist. Check the path.')


def get_img_mode(settings: DataSettings) -> str:
    """PIL mode of the images: --input-img-mode if given, else RGB for three channels, else L."""
    return settings.input_img_mode or ('RGB' if settings.num_channels == 3 else 'L')
