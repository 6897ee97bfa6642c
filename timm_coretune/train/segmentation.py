"""Creates the parts of a run that classifies pixels. classification.py has the same functions for images"""

import logging
import math
import os
from functools import partial
from typing import Any, Dict, Iterable, List, Optional, Tuple, cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.data import resolve_data_config
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.task import ClassificationTask, TrainingTask
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler

from ..data.resumable import make_resumable
from ..evaluation.segmentation import SegmentationEvaluator
from ..export import fit_channels
from ..run_folder import PREDICTIONS_NAME, SEGMENTATION_CONFIG_NAME, describe_weights
from ..segmentation import (
    SegmentationModel,
    SegmentationTask,
    create_segmentation_model,
    load_segmentation_model,
)
from ..segmentation.data.dataset import SegmentationDataset, create_dataset, open_source, read_class_names
from ..segmentation.data.folders import read_lines
from ..segmentation.data.mapped import MappedSource, map_masks
from ..segmentation.data.masks import IGNORE_INDEX
from ..segmentation.data.transforms import (
    INTERPOLATIONS,
    adapt_data_config,
    create_eval_transform,
    create_train_transform,
)
from ..segmentation.dense import DenseCrossEntropy
from ..segmentation.export import write_segmentation_config
from ..segmentation.predict import draw_predictions
from .cli.criterion import check_class_stats, read_class_stats, weight_of_each_class
from .cli.settings import DataSettings, ModelSettings, Settings
from .data.datasets import Datasets
from .data.loaders import Loaders, check_fills_a_batch
from .data.opening import get_img_mode
from .data.shares import take_fraction
from .data.splits import check_disjoint, real_paths
from .data.workers import outliving_signals
from .model import create_backbone, load_initial_checkpoint, log_preprocessing

_logger = logging.getLogger(__name__)

CONFIG = SEGMENTATION_CONFIG_NAME  # name of the file that describes the model in a run folder


def _read_names(path: str) -> Optional[List[str]]:
    try:
        return read_lines(path) if path else None
    except OSError as e:
        raise ValueError(f'Expected the name of a class in each line of --class-map {path!r}: {e}') from e


def _ignore_index(data: DataSettings) -> int:
    """Value of the pixels that are left out, in all masks behind the data sets. Those that were mapped have 255."""
    return IGNORE_INDEX if data.remap_masks else data.ignore_index


def _identities(dataset: SegmentationDataset) -> Iterable[str]:
    """What tells the images of a data set apart: their files, or else the names that they have in messages."""
    images = getattr(dataset.source, 'images', None)
    return real_paths(images) if images else map(dataset.source.name, range(len(dataset)))


def open_datasets(settings: Settings) -> Datasets:
    """Open both splits, the validation split with the classes of the training split, which --eval-only leaves out."""
    data = settings.data
    options: Dict[str, Any] = dict(
        input_key=data.input_key,
        target_key=data.target_key,
        download=data.dataset_download,
        hold_out=bool(data.val_split),
    )
    root, trains = data.data_dir or '', not settings.loop.eval_only
    num_classes, class_names = settings.model.num_classes, _read_names(data.class_map) or read_class_names(root)
    # classes that are numbered by what occurs depend on both splits, also where one is validated alone
    names = [data.train_split] if trains or data.remap_masks else []
    names += [data.val_split] if data.val_split else []
    sources = [open_source(data.dataset, root, name, **options) for name in names]
    sources = map_masks(
        sources, data.mask_colors, data.remap_masks, data.reduce_zero_label, class_names, data.ignore_index
    )
    if isinstance(sources[0], MappedSource):
        class_names = sources[0].class_names
    reduces_zero = data.reduce_zero_label and not data.remap_masks  # then it is mapped already
    create = partial(
        create_dataset,
        reduce_zero_label=reduces_zero,
        img_mode=get_img_mode(data),
        ignore_index=_ignore_index(data),
    )
    train: Any = None
    validation = known = None
    if trains:
        train = known = create(sources[0], num_classes, class_names)
        num_classes, class_names = known.num_classes, known.class_names
    if data.val_split:
        validation = create(sources[-1], num_classes, class_names)
    if train is not None and validation is not None:
        check_disjoint(_identities(train), _identities(validation))
    known = known or cast(SegmentationDataset, validation)
    if train is not None and data.label_fraction < 1:
        train = take_fraction(train, [0] * len(train), data.label_fraction, settings.loop.seed)
    return Datasets(train, validation, known.num_classes, known.class_names)


def create_model(settings: Settings, num_classes: Optional[int], verbose: bool) -> Tuple[nn.Module, Dict[str, Any]]:
    """Create backbone and head, load the checkpoint, and return the model with the preprocessing of its images."""
    backbone: Any = create_backbone(settings.model, 0, settings.data, whole=False)
    description = describe_weights(settings.model.initial_checkpoint)
    if description is not None and description.architecture != backbone.pretrained_cfg['architecture']:
        description = None
    if description is not None:
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, **description.data_config}
    if settings.model.initial_checkpoint:
        log_preprocessing(settings.data, description and description.data_config, description and description.path)
    resolved = resolve_data_config(vars(settings.data), model=backbone, verbose=verbose)
    data_config = adapt_data_config(fit_channels(resolved, settings.data.num_channels))
    img_size = data_config['input_size'][1:]
    model = create_segmentation_model(
        backbone, cast(int, num_classes), head=settings.model.segmentation_head, img_size=img_size
    )
    maps = [f'1/{r} ({c} channels)' for r, c in zip(model.maps.reductions, model.maps.channels, strict=True)]
    num_unused = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    _logger.info(
        f'{model.head} on maps of {", ".join(maps)}; {num_unused:,} parameters of the backbone have no part in them '
        'and do not train.'
    )
    load_initial_checkpoint(settings.model, model)
    return model, data_config


def _create_loader(settings: DataSettings, dataset: SegmentationDataset, **kwargs: Any) -> DataLoader:
    loader: DataLoader = DataLoader(
        dataset,
        num_workers=settings.workers,
        pin_memory=settings.pin_mem,
        persistent_workers=settings.workers > 0,
        **kwargs,
    )
    return outliving_signals(loader)


def _create_train_loader(
    settings: DataSettings,
    data_config: Dict[str, Any],
    dataset: Any,
    accelerator: Accelerator,
    seed: int,
) -> DataLoader:
    """Create the loader of augmented images and masks, which can start at any batch of an epoch."""
    size = data_config['input_size'][1:]
    normalization = dict(mean=data_config['mean'], std=data_config['std'])
    interpolation = settings.train_interpolation
    if settings.no_aug or interpolation not in INTERPOLATIONS:  # such as 'random', the default
        interpolation = data_config['interpolation']
    if settings.no_aug:
        dataset.transform = create_eval_transform(
            size, **normalization, interpolation=interpolation, ignore_index=_ignore_index(settings)
        )
    else:
        dataset.transform = create_train_transform(
            size,
            **normalization,
            scale=(settings.scale[0], settings.scale[1]),
            ratio=(settings.ratio[0], settings.ratio[1]),
            hflip=settings.hflip,
            vflip=settings.vflip,
            color_jitter=settings.color_jitter or 0.0,
            interpolation=interpolation,
        )
    order: Sampler = RandomSampler(dataset)
    if accelerator.num_processes > 1:
        order = DistributedSampler(dataset, accelerator.num_processes, accelerator.process_index)
    loader = _create_loader(settings, dataset, batch_size=settings.batch_size, sampler=order, drop_last=True)
    check_fills_a_batch(loader, dataset, settings.batch_size, accelerator.num_processes)
    return make_resumable(loader, seed, accelerator.process_index, accelerator.num_processes)


def _create_validation_loader(
    settings: DataSettings,
    data_config: Dict[str, Any],
    dataset: Any,
    accelerator: Accelerator,
) -> DataLoader:
    """Create the loader of validation images and masks, which are fitted into the size of training images."""
    dataset.transform = create_eval_transform(
        data_config['input_size'][1:],
        mean=data_config['mean'],
        std=data_config['std'],
        interpolation=data_config['interpolation'],
        ignore_index=_ignore_index(settings),
    )
    order = None
    if accelerator.num_processes > 1:
        order = OrderedDistributedSampler(dataset, accelerator.num_processes, accelerator.process_index)
    batch_size = settings.validation_batch_size or settings.batch_size
    return _create_loader(settings, dataset, batch_size=batch_size, sampler=order)


def create_loaders(
    settings: Settings,
    data_config: Dict[str, Any],
    model: nn.Module,
    datasets: Datasets,
    accelerator: Accelerator,
) -> Loaders:
    """Create the loaders of both splits."""
    train = validation = None
    if datasets.train is not None:
        train = _create_train_loader(settings.data, data_config, datasets.train, accelerator, settings.loop.seed)
    if datasets.validation is not None:
        validation = _create_validation_loader(settings.data, data_config, datasets.validation, accelerator)
    return Loaders(train, validation, None)


def create_task(
    settings: Settings, model: nn.Module, datasets: Datasets, device: torch.device, verbose: bool
) -> TrainingTask:
    """Create the task of Core-tuning or another --method, or else one with cross-entropy over all pixels."""
    loss = settings.loss
    dtype = getattr(torch, settings.model.model_dtype) if settings.model.model_dtype else None
    common: Dict[str, Any] = dict(device=device, dtype=dtype, verbose=verbose)
    num_classes = cast(SegmentationModel, model).num_classes
    stats = read_class_stats(loss.class_stats) if loss.class_stats is not None else None
    if stats is not None:
        check_class_stats(stats, num_classes, datasets.class_names)
    class_weight = weight_of_each_class(loss, stats, num_classes)
    if loss.task_loss is not None:
        return SegmentationTask(
            cast(SegmentationModel, model),
            loss.task_loss,
            anchors_per_image=loss.anchors_per_image,
            ignore_index=_ignore_index(settings.data),
            **loss.loss_kwargs(pixels=True),
            class_weight=class_weight,
            generator=torch.Generator().manual_seed(settings.loop.seed),
            **common,
        )
    criterion = DenseCrossEntropy(_ignore_index(settings.data), loss.smoothing, class_weight)
    return ClassificationTask(model, criterion=criterion, **common)


def create_evaluator(
    settings: Settings,
    num_classes: int,
    class_names: Optional[List[str]],
    device: torch.device,
) -> SegmentationEvaluator:
    """Create what computes the validation metrics."""
    return SegmentationEvaluator(num_classes, class_names, _ignore_index(settings.data), device)


def save_config(
    model: nn.Module,
    folder: str,
    data_config: Dict[str, Any],
    class_names: Optional[List[str]],
) -> None:
    """Write the file with which load_segmentation_model builds the model for the weights in this folder.

    Raises:
        ValueError: The backbone was built with an argument that JSON cannot hold.
    """
    path = os.path.join(folder, CONFIG)
    write_segmentation_config(cast(SegmentationModel, model), path, data_config, class_names)


def log_contrast(settings: Settings, datasets: Datasets, num_processes: int) -> None:
    """Log the number of contrasted pixels, and the contrastive loss at chance."""
    num_gathered = 1 if settings.loss.no_coretune_gather else num_processes
    anchors_per_image, batch_size = settings.loss.anchors_per_image, settings.data.batch_size
    num_anchors = batch_size * num_gathered * anchors_per_image
    num_candidates = settings.loss.num_candidates(num_anchors)
    _logger.info(
        f'Contrast over up to {num_anchors} pixels ({anchors_per_image} an image x {batch_size} images x '
        f'{num_gathered} process(es)): at chance its loss without the focal factor is ln {num_candidates} = '
        f'{math.log(num_candidates):.2f}.'
    )


def load_hint(settings: ModelSettings, num_classes: int, folder: str) -> str:
    """A line of Python that loads the best weights of a run."""
    return f"timm_coretune.load_segmentation_model('{folder}')"


def load_pushed_hint(repo_id: str) -> str:
    """A line of Python that loads the weights of a run from the Hub."""
    return f"timm_coretune.load_segmentation_model('hf-hub:{repo_id}')"


def draw(folder: str, datasets: Datasets, num_images: int = 6) -> Optional[str]:
    """Draw the first validation images with their masks and the predictions of the best weights of a run.

    Returns:
        Path of the picture, None if there are no validation images.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if datasets.validation is None:
        return None
    dataset = cast(SegmentationDataset, datasets.validation)
    path = os.path.join(folder, PREDICTIONS_NAME)
    draw_predictions(load_segmentation_model(folder), dataset, path, num_images)
    return path
