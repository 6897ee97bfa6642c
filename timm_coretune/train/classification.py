"""Creates the parts of a run that classifies images. segmentation.py has the same functions for pixels"""

import functools
import logging
import math
import os
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.data import resolve_data_config
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

from ..data.class_balance import expected_positives
from ..evaluation.classification import ClassificationEvaluator
from ..evaluation.multi_label import MultiLabelEvaluator
from ..evaluation.scores import Evaluator
from ..export import create_config, fit_channels, write_json
from ..redaction import python_path, redact
from ..run_folder import BEST_WEIGHTS_NAME, CONFIG_NAME
from ..task import CoreTuningTask
from .cli.conflicts import split_names
from .cli.criterion import (
    ClassStats,
    check_class_stats,
    create_criterion,
    label_loss,
    needs_stats,
    read_class_stats,
    weight_of_each_class,
)
from .cli.settings import LossSettings, ModelSettings, Settings
from .data.classes import read_model_classes
from .data.datasets import Datasets, create_datasets
from .data.labelled import count_classes, count_labels
from .data.loaders import LoaderFactory, Loaders
from .data.multi_label import count_label_sets
from .model import create_backbone

_logger = logging.getLogger(__name__)

CONFIG = CONFIG_NAME  # name of the file that describes the model in a run folder


def open_datasets(settings: Settings) -> Datasets:
    """Open the validation split and, unless nothing is trained, the training split."""
    with_training = not settings.loop.eval_only
    datasets = create_datasets(
        settings.data,
        with_training,
        settings.loop.seed,
        read_model_classes(settings.model),
        settings.model.num_classes,
    )
    _check_several_classes(datasets, settings.model.num_classes)
    return datasets


def _check_several_classes(datasets: Datasets, asked: Optional[int]) -> None:
    """Warn if all training images are of one class, and raise a ValueError if the model has no other class either."""
    counts = count_labels(datasets.train)
    if counts is None or len(counts) != 1:
        return
    names = datasets.class_names
    name = f', {names[0]!r}' if names and len(names) == 1 else ''
    found = f'all {counts[0]} training images are of one class{name}'
    if (asked or datasets.num_classes or 1) < 2:
        raise ValueError(
            f'Expected images of two classes or more, {found}: any model is right about all of them. Check the folders '
            'in --data-dir; each class is one.'
        )
    _logger.warning(f'ONE CLASS: {found}. A model learns nothing from them but to name it.')


def create_model(settings: Settings, num_classes: Optional[int], verbose: bool) -> Tuple[nn.Module, Dict[str, Any]]:
    """Create the model, load its checkpoint, and return it with the preprocessing of its images."""
    model = create_backbone(settings.model, num_classes, settings.data)
    if num_classes is None and verbose:
        _logger.warning(
            f'THE NUMBER OF CLASSES IS NOT KNOWN: the model keeps its default of {model.num_classes}. Give '
            '--num-classes, or a data set that knows its classes.'
        )
    data_config = resolve_data_config(vars(settings.data), model=model, verbose=verbose)
    return model, fit_channels(data_config, settings.data.num_channels)


def create_loaders(
    settings: Settings,
    data_config: Dict[str, Any],
    model: nn.Module,
    datasets: Datasets,
    accelerator: Accelerator,
) -> Loaders:
    """Create the loaders of both splits."""
    factory = LoaderFactory(
        settings.data,
        data_config,
        model,
        accelerator,
        img_dtype=getattr(torch, settings.model.model_dtype or 'float32'),
        smoothing=settings.loss.smoothing,
        seed=settings.loop.seed,
        epochs=settings.optimization.epochs,
    )
    return factory.create(datasets, with_watched=settings.loop.watch_features > 0)


def _find_class_stats(
    settings: LossSettings, datasets: Datasets, num_classes: int, several: bool
) -> Optional[ClassStats]:
    """Class counts for the weights of classes, from --class-stats or the training split. None if none are needed."""
    if not needs_stats(settings):
        return None
    if settings.class_stats is not None:
        stats = read_class_stats(settings.class_stats)
    else:
        counts = None
        if datasets.train is not None:
            counts = count_label_sets(datasets.train) if several else count_classes(datasets.train, num_classes)
        if counts is None:
            raise ValueError(
                'Expected training images whose labels are known without reading them, to count the classes for the '
                'weights of the loss. Give the counts by --class-stats FILE.'
            )
        stats = ClassStats(*counts, 'the training split')
    check_class_stats(stats, num_classes, datasets.class_names)
    most, least = int(stats.counts.max()), int(stats.counts.min())
    _logger.info(f'Class counts from {stats.source}: {stats.num_samples} images, {least} to {most} a class.')
    return stats


def _create_distillation_task(loss: LossSettings, model: nn.Module, **kwargs: Any) -> TrainingTask:
    kwargs.update(
        student_model=model,
        teacher_model=loss.kd_model_name,
        distill_loss_weight=loss.distill_loss_weight,
        task_loss_weight=loss.task_loss_weight,
    )
    if loss.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            student_feature_dim=loss.kd_student_feature_dim,
            teacher_feature_dim=loss.kd_teacher_feature_dim,
            **kwargs,
        )
    if loss.kd_distill_type == 'token':
        return TokenDistillationTask(
            distill_type=loss.kd_token_distill_type,
            temperature=loss.kd_temperature,
            **kwargs,
        )
    return LogitDistillationTask(loss_type=loss.kd_loss_type, temperature=loss.kd_temperature, **kwargs)


def create_task(
    settings: Settings, model: nn.Module, datasets: Datasets, device: torch.device, verbose: bool
) -> TrainingTask:
    """Create the task of Core-tuning or another --method, or one of timm's tasks."""
    loss, data = settings.loss, settings.data
    num_classes: Any = model.num_classes
    stats = _find_class_stats(loss, datasets, num_classes, data.is_multi_label)
    dtype = getattr(torch, settings.model.model_dtype) if settings.model.model_dtype else None
    common: Dict[str, Any] = dict(device=device, dtype=dtype, verbose=verbose)
    create = functools.partial(
        create_criterion,
        loss,
        soft_targets=data.mixes_pixels,
        aug_splits=data.aug_splits,
        multi_label=data.is_multi_label,
        stats=stats,
        num_classes=num_classes,
    )
    if loss.task_loss is not None:
        if data.mixes_pixels and not data.is_multi_label:
            _logger.info('Pixel mixup makes soft targets: pairs are mined by the most probable class of each image.')
        if data.is_multi_label:
            of_labels: Dict[str, Any] = dict(multi_label=True, classification_loss=create())
        elif label_loss(loss, multi_label=False) != 'ce':
            of_labels = dict(classification_loss=create(soft_targets=True))
        else:
            of_labels = dict(class_weight=weight_of_each_class(loss, stats, num_classes))
        return CoreTuningTask(
            model,
            loss.task_loss,
            **loss.loss_kwargs(),
            **of_labels,
            generator=torch.Generator().manual_seed(settings.loop.seed),
            uneven_batches=data.naflex_loader,  # batches of different sequence lengths differ in size
            **common,
        )
    criterion = create().to(device)
    if data.is_multi_label:
        return MultiLabelClassificationTask(model, criterion, threshold=data.multilabel_threshold, **common)
    common['criterion'] = criterion
    if loss.kd_model_name:
        return _create_distillation_task(loss, model, **common)
    return ClassificationTask(model, **common)


def create_evaluator(
    settings: Settings,
    num_classes: int,
    class_names: Optional[List[str]],
    device: torch.device,
) -> Evaluator:
    """Create what computes the validation metrics."""
    if settings.data.is_multi_label:
        threshold, metrics = settings.data.multilabel_threshold, split_names(settings.loop.metrics)
        return MultiLabelEvaluator(device, threshold, metrics, num_classes, class_names)
    return ClassificationEvaluator(device, split_names(settings.loop.metrics), num_classes, class_names)


def save_config(
    model: nn.Module,
    folder: str,
    data_config: Dict[str, Any],
    class_names: Optional[List[str]],
) -> None:
    """Write the file with which plain timm builds the model for the weights in this folder.

    Raises:
        ValueError: The model was built with an argument that JSON cannot hold.
    """
    write_json(create_config(model, data_config, class_names), os.path.join(folder, CONFIG))


def log_contrast(settings: Settings, datasets: Datasets, num_processes: int) -> None:
    """Log the size of the contrasted batch, the positives per image, and the contrastive loss at chance."""
    data = settings.data
    num_gathered = 1 if settings.loss.no_coretune_gather else num_processes
    batch_size = data.batch_size * data.contrast_batches * num_gathered
    together = f' x {data.contrast_batches} batches' if data.contrast_batches > 1 else ''
    num_candidates = max(settings.loss.num_candidates(batch_size), 1)
    message = (
        f'Contrast over {batch_size} images ({data.batch_size}{together} x {num_gathered} process(es); accumulation '
        f'does not enlarge it): at chance its loss without the focal factor is ln {num_candidates} = '
        f'{math.log(num_candidates):.2f}.'
    )
    counts = count_labels(datasets.train)
    if counts:
        if data.class_balance:
            alone = counts.count(1) / sum(counts)
            message += f' A class in a batch is there at least twice; {100 * alone:.1f} % of the images have no other.'
        else:
            positives, alone = expected_positives(counts, batch_size)
            message += (
                f' An image finds {positives:.1f} positives on average, {100 * alone:.1f} % of the images find none '
                'but their mixture.'
            )
        if batch_size < 2 * len(counts) and not data.class_balance:
            _logger.warning(
                f'A batch of {batch_size} is less than twice the {len(counts)} classes: many images find no positive. '
                'Consider a larger --batch-size or --contrast-batch-size, or --class-balance.'
            )
    _logger.info(message)


def load_hint(settings: ModelSettings, num_classes: int, folder: str) -> str:
    """Lines of Python that load the best weights of a run and the transform of its validation images."""
    if os.path.exists(os.path.join(folder, CONFIG)):
        path = os.path.abspath(folder)
        name = repr(f'local-dir:{path}') if redact(path) == path else f"'local-dir:' + {python_path(path)}"
        transform = 'timm.data.create_transform(**timm.data.resolve_model_data_config(model))'
        return f'model = timm.create_model({name}, pretrained=True).eval(); transform = {transform}'
    kwargs = ''.join(f', {k}={v!r}' for k, v in {'num_classes': num_classes, **settings.model_kwargs}.items())
    weights = os.path.join(folder, BEST_WEIGHTS_NAME)
    return (
        f'timm.create_model({settings.model!r}{kwargs}, checkpoint_path={python_path(weights)}), for images prepared '
        f'as in this run: there is no {CONFIG} that says how'
    )


def load_pushed_hint(repo_id: str) -> str:
    """A line of Python that loads the weights of a run from the Hub."""
    return f"timm.create_model('hf-hub:{repo_id}', pretrained=True)"


def draw(folder: str, datasets: Datasets) -> Optional[str]:
    """Always None: predictions are drawn in segmentation only."""
    return None
