"""Segmentation from the arguments: what differs from the classification of images, and nothing else"""

import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

import torch.nn as nn
from accelerate import Accelerator
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import adapt_to_chs
from timm.task import ClassificationTask, TrainingTask
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from ..checkpoint import load_checkpoint
from ..report.plots import plot_segmentation
from ..run_folder import PREDICTIONS_NAME
from ..segmentation import (
    SegmentationModel,
    SegmentationTask,
    create_segmentation_model,
    load_segmentation_model,
    predict_image,
)
from ..segmentation.data.dataset import SegmentationDataset, open_dataset
from ..segmentation.data.folders import read_lines
from ..segmentation.data.masks import IGNORE_INDEX
from ..segmentation.data.palette import voc_palette
from ..segmentation.data.transforms import INTERPOLATIONS, create_eval_transform, create_train_transform
from ..segmentation.dense import DenseCrossEntropy
from .data.resumable import make_resumable

_logger = logging.getLogger(__name__)


def _read_names(path: str) -> Optional[List[str]]:
    try:
        return read_lines(path) if path else None
    except OSError as e:
        raise ValueError(f'Expected the name of a class in each line of --class-map {path!r}: {e}') from e


def open_splits(
    args: argparse.Namespace,
    img_mode: str,
) -> Tuple[Optional[SegmentationDataset], Optional[SegmentationDataset]]:
    """Open both splits, the training split unless nothing is trained. The validation split has its classes."""
    options = dict(
        reduce_zero_label=args.reduce_zero_label,
        img_mode=img_mode,
        input_key=args.input_key,
        target_key=args.target_key,
        download=args.dataset_download,
        hold_out=bool(args.val_split),
    )
    classes = dict(num_classes=args.num_classes, class_names=_read_names(args.class_map))
    train = validation = None
    if not args.eval_only:
        train = open_dataset(args.dataset, args.data_dir, args.train_split, **classes, **options)
        classes = dict(num_classes=train.num_classes, class_names=train.class_names)
    if args.val_split:
        validation = open_dataset(args.dataset, args.data_dir, args.val_split, **classes, **options)
    return train, validation


def resolve_pixel_config(data_config: Dict[str, Any]) -> Dict[str, Any]:
    """The preprocessing of images with masks, which are tensors and resized in fewer ways than PIL's images.

    Mean and standard deviation are those of as many channels as there are, which timm sees to in its loader.
    """
    interpolation, channels = data_config['interpolation'], data_config['input_size'][0]
    return {
        **data_config,
        'interpolation': interpolation if interpolation in INTERPOLATIONS else 'bicubic',
        'mean': adapt_to_chs(data_config['mean'], channels),
        'std': adapt_to_chs(data_config['std'], channels),
    }


def create_pixel_model(
    args: argparse.Namespace,
    backbone: nn.Module,
    num_classes: int,
    data_config: Dict[str, Any],
) -> SegmentationModel:
    """Put the head on a backbone whose checkpoint is loaded, and load what the whole starts from."""
    img_size = data_config['input_size'][1:]
    model = create_segmentation_model(backbone, num_classes, head=args.segmentation_head, img_size=img_size)
    maps = [f'1/{r} ({c} channels)' for r, c in zip(model.maps.reductions, model.maps.channels, strict=True)]
    num_unused = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    _logger.info(
        f'{model.head} on maps of {", ".join(maps)}; {num_unused:,} parameters of the backbone have no part in them '
        'and do not train.'
    )
    if args.initial_checkpoint:
        options = dict(checkpoint_key=args.checkpoint_key, allow_partial=args.allow_partial)
        load_checkpoint(model, args.initial_checkpoint, load_classifier=True, **options)
    return model


def create_pixel_task(
    args: argparse.Namespace,
    model: SegmentationModel,
    loss_kwargs: Dict[str, Any],
    common: Dict[str, Any],
) -> TrainingTask:
    """Core-tuning of pixels, or plain tuning with the cross-entropy that is a part of it."""
    if args.coretune:
        return SegmentationTask(model, anchors_per_image=args.anchors_per_image, **loss_kwargs, **common)
    return ClassificationTask(model, criterion=DenseCrossEntropy(IGNORE_INDEX, args.smoothing), **common)


def _create_loader(args: argparse.Namespace, dataset: Dataset, **kwargs) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        persistent_workers=args.workers > 0,
        **kwargs,
    )


def create_train_loader(
    args: argparse.Namespace,
    data_config: Dict[str, Any],
    dataset: Dataset,
    accelerator: Accelerator,
) -> DataLoader:
    """Batches of augmented images and masks, which start at any place of an epoch."""
    size = data_config['input_size'][1:]
    normalization = dict(mean=data_config['mean'], std=data_config['std'])
    interpolation = args.train_interpolation
    if args.no_aug or interpolation not in INTERPOLATIONS:  # random by default
        interpolation = data_config['interpolation']
    if args.no_aug:
        dataset.transform = create_eval_transform(size, **normalization, interpolation=interpolation)
    else:
        dataset.transform = create_train_transform(
            size,
            **normalization,
            scale=tuple(args.scale or (0.08, 1.0)),
            ratio=tuple(args.ratio or (3 / 4, 4 / 3)),
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter or 0.0,
            interpolation=interpolation,
        )
    order = RandomSampler(dataset)
    if accelerator.num_processes > 1:
        order = DistributedSampler(dataset, accelerator.num_processes, accelerator.process_index)
    loader = _create_loader(args, dataset, batch_size=args.batch_size, sampler=order, drop_last=True)
    return make_resumable(loader, args.seed, accelerator.process_index, accelerator.num_processes)


def create_validation_loader(
    args: argparse.Namespace,
    data_config: Dict[str, Any],
    dataset: Dataset,
    accelerator: Accelerator,
) -> DataLoader:
    """Batches of images and masks, fitted into the size of the training images."""
    dataset.transform = create_eval_transform(
        data_config['input_size'][1:],
        mean=data_config['mean'],
        std=data_config['std'],
        interpolation=data_config['interpolation'],
    )
    order = None
    if accelerator.num_processes > 1:
        order = OrderedDistributedSampler(dataset, accelerator.num_processes, accelerator.process_index)
    return _create_loader(args, dataset, batch_size=args.validation_batch_size or args.batch_size, sampler=order)


def draw_predictions(folder: str, dataset: SegmentationDataset, num_images: int = 6) -> str:
    """Draw the first validation images with their masks and what the saved weights of a run predict.

    Returns:
        Path of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    dataset.transform = None
    samples = [dataset[index] for index in range(min(num_images, len(dataset)))]
    model = load_segmentation_model(folder)
    predictions = [predict_image(model, image) for image, _ in samples]
    path = os.path.join(folder, PREDICTIONS_NAME)
    images, masks = [image for image, _ in samples], [mask for _, mask in samples]
    plot_segmentation(images, masks, predictions, voc_palette(), dataset.class_names, path, IGNORE_INDEX)
    return path
