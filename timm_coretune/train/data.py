"""Data sets and loaders: timm's, from the arguments"""

import argparse
import os
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from accelerate import Accelerator
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader

from .reader import ReaderSafetensors


class Datasets(NamedTuple):
    """What is trained and validated on.

    Attributes:
        train: Labelled training images.
        validation: Labelled validation images, None without a validation split.
        num_classes: Classes of the training split, None where the data set cannot tell.
    """

    train: torch.utils.data.Dataset
    validation: Optional[torch.utils.data.Dataset]
    num_classes: Optional[int]


class Loaders(NamedTuple):
    """Loaders of both splits, and pixel mixup where the training loader does not do it itself."""

    train: Any
    validation: Any
    mixup_fn: Optional[Mixup]


def get_in_chans(args: argparse.Namespace) -> int:
    """Image channels: those asked for, else 3."""
    if args.in_chans is not None:
        return args.in_chans
    return args.input_size[0] if args.input_size is not None else 3


def _create_split(args: argparse.Namespace, split: str, is_training: bool) -> torch.utils.data.Dataset:
    img_mode = args.input_img_mode or ('RGB' if get_in_chans(args) == 3 else 'L')
    if not args.dataset and not os.path.exists(args.data_dir):
        raise ValueError(f'Expected images in --data-dir {args.data_dir!r}, which does not exist. Check the path.')
    if not args.dataset and args.data_dir.endswith('.safetensors'):
        return ImageDataset(args.data_dir, reader=ReaderSafetensors(args.data_dir, split), input_img_mode=img_mode)
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            repeats=args.epoch_repeats if is_training else 0,
            input_img_mode=img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except RuntimeError as e:
        raise ValueError(
            f'Expected images of the {split} split in --data-dir {args.data_dir!r}: {e} Images lie in one folder a '
            f'class, in a folder {split}/ where there are several splits.'
        ) from e


def _class_names(dataset: torch.utils.data.Dataset) -> Optional[Dict[str, int]]:
    # timm keeps them in the reader, torchvision in the data set
    reader = getattr(dataset, 'reader', dataset)
    return getattr(reader, 'class_to_idx', None) or None


def create_datasets(args: argparse.Namespace) -> Datasets:
    """Open both splits.

    Raises:
        ValueError: The data does not exist, holds no images, or the splits have different classes.
    """
    train = _create_split(args, args.train_split, is_training=True)
    validation = _create_split(args, args.val_split, is_training=False) if args.val_split else None
    classes = _class_names(train)
    if classes and validation is not None and _class_names(validation) not in (None, classes):
        difference = sorted(set(classes) ^ set(_class_names(validation)))
        raise ValueError(
            f'Expected the same classes in {args.train_split} and {args.val_split} of {args.data_dir!r}, these are in '
            f'one only: {", ".join(difference[:5])}. Check the folders, or --train-split and --val-split.'
        )
    return Datasets(train, validation, len(classes) if classes else None)


def _mixup_kwargs(args: argparse.Namespace, num_classes: int) -> Dict[str, Any]:
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return {}
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def create_loaders(
    args: argparse.Namespace,
    datasets: Datasets,
    data_config: Dict[str, Any],
    num_classes: int,
    accelerator: Accelerator,
) -> Loaders:
    """Create timm's loaders.

    Raises:
        ValueError: The training split does not fill one batch.
    """
    common = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=accelerator.device,
        distributed=accelerator.num_processes > 1,
        use_prefetcher=not args.no_prefetcher,
        persistent_workers=args.workers > 0,
    )
    mixup = _mixup_kwargs(args, num_classes)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    train = create_loader(
        datasets.train,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
        auto_augment=args.aa,
        interpolation=interpolation,
        worker_seeding=args.worker_seeding,
        collate_fn=FastCollateMixup(**mixup) if mixup and not args.no_prefetcher else None,
        **common,
    )
    if len(train) == 0:
        raise ValueError(
            f'Expected at least one batch of {args.batch_size} images for each of {accelerator.num_processes} '
            f'process(es), the training split has {len(datasets.train)}. Lower --batch-size.'
        )
    validation = None
    if datasets.validation is not None:
        validation = create_loader(
            datasets.validation,
            batch_size=args.validation_batch_size or args.batch_size,
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            **common,
        )
    return Loaders(train, validation, Mixup(**mixup) if mixup and args.no_prefetcher else None)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader's data set and sampler which epoch comes, so that each is shuffled anew."""
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)


def num_own_samples(loader: Any, accelerator: Accelerator) -> Optional[int]:
    """Validation images of this process without those a distributed sampler repeats to even out, None without one."""
    if accelerator.num_processes == 1 or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return None
    return len(range(accelerator.process_index, len(loader.dataset), accelerator.num_processes))


def to_device(
    batch: Tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    channels_last: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images and labels on the device, where a prefetching loader has put them already."""
    input, target = (x.to(device, non_blocking=True) for x in batch)
    return (input.contiguous(memory_format=torch.channels_last) if channels_last else input), target
