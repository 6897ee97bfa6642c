"""The training loop of train.py for a notebook or script that has a model and two loaders"""

import dataclasses
import functools
import logging
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.task import ClassificationTask, TrainingTask

from ..data.seeding import seeded
from ..prediction.preparation import describe_transform, find_class_names, find_transform
from ..prediction.tuned import FineTuned, check_names
from ..task import CoreTuningTask
from .cli.settings import OptimizationSettings
from .loop import Trainer
from .loop_config import LoopConfig
from .optimization import clip_gradients, create_optimizer, create_schedule, resolve_lr
from .watching.record import Record

_logger = logging.getLogger(__name__)


def _with_one_accumulation(
    config: LoopConfig, optimization: OptimizationSettings
) -> Tuple[LoopConfig, OptimizationSettings]:
    """Both with the grad_accum_steps of the one that has it, since the loop reads it in one and the rate in the other.

    Raises:
        ValueError: They differ.
    """
    of_loop, of_rate = config.grad_accum_steps, optimization.grad_accum_steps
    if of_loop != of_rate and 1 not in (of_loop, of_rate):
        raise ValueError(
            f'Expected one number of batches per update, got grad_accum_steps {of_loop} in config and {of_rate} in '
            'optimization. Leave it out in one of them.'
        )
    steps = max(of_loop, of_rate)
    return (
        dataclasses.replace(config, grad_accum_steps=steps),
        dataclasses.replace(optimization, grad_accum_steps=steps),
    )  # fmt: skip


def _batch_size_of(loader: Any) -> int:
    """Images per batch and process.

    Raises:
        ValueError: The loader does not tell.
    """
    order: Any = getattr(loader, 'batch_sampler', None)
    size = getattr(loader, 'batch_size', None) or getattr(order, 'batch_size', None)
    if size is None:
        raise ValueError('Expected a loader with a batch_size, to scale lr_base by, got one without. Give lr instead.')
    return size // (order.num_processes if getattr(order, 'split_batches', False) else 1)


class _EpochLines(Record):
    """Prints a line after each epoch."""

    def __init__(self, num_epochs: int):
        self.num_epochs, self.start = num_epochs, time.perf_counter()

    def save_epoch(
        self,
        trainer: Trainer,
        epoch: int,
        is_best: bool,
        train_metrics: Dict[str, float],
        eval_metrics: Optional[Dict[str, float]],
        features: Optional[Dict[str, float]] = None,
    ) -> None:
        parts = [('training', train_metrics), *([] if eval_metrics is None else [('validation', eval_metrics)])]
        told = [f'{what}: ' + ', '.join(f'{name} {value:.4g}' for name, value in part.items()) for what, part in parts]
        seconds, self.start = time.perf_counter() - self.start, time.perf_counter()
        print(
            f'Epoch {epoch + 1}/{self.num_epochs}  {"  ".join(told)}  {seconds:.1f} s'
            + ('  (best so far)' if is_best else ''),
            flush=True,
        )


def _names_of(model: nn.Module, loaders: Sequence[Any]) -> Optional[List[str]]:
    """Names of the classes that the data sets have, None if they have none or others than the model."""
    names = find_class_names(*loaders)
    try:
        check_names(model, names)
    except ValueError as e:
        _logger.warning(f'The names of the classes are not taken from the data set: {e}')
        return None
    return names


def _preparation_of(loaders: Sequence[Any]) -> Optional[Dict[str, Any]]:
    """Preparation of images by the transform of the data sets, None if it is not known."""
    transform = find_transform(*loaders)
    dataset: Any = getattr(loaders[0], 'dataset', None)
    if transform is None or not hasattr(dataset, '__getitem__') or not len(dataset):
        return None
    image = dataset[0][0]
    return describe_transform(transform, tuple(image.shape)) if getattr(image, 'ndim', None) == 3 else None


def fine_tune(
    model: nn.Module,
    train_loader: Any,
    validation_loader: Optional[Any] = None,
    epochs: int = 10,
    lr: float = 0.01,
    opt: str = 'sgd',
    weight_decay: float = 1e-4,
    coretune: bool = True,
    accelerator: Optional[Accelerator] = None,
    config: Optional[LoopConfig] = None,
    optimization: Optional[OptimizationSettings] = None,
    seed: Optional[int] = None,
    method: str = 'core',
    class_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    progress: bool = True,
    **loss_kwargs: Any,
) -> FineTuned:
    """Fine-tune a timm classifier in place, by default with Core-tuning and a cosine schedule.

    All random draws follow from the seed: those of the loss, of the model, and of a loader without workers. The
    generators of Python, NumPy and torch are as before afterwards.

    Args:
        model: A timm classifier with its checkpoint loaded.
        train_loader: Batches of float images (B, 3, H, W) and int64 class indices (B,), with one B on all processes.
        validation_loader: Batches to validate on. In several processes a loader that is plain, prepared by accelerate
            or has a DistributedSampler. When None, the training loss selects the best epoch.
        epochs: Number of epochs.
        lr: Learning rate at the start.
        opt: Name of a timm optimizer.
        weight_decay: Weight decay.
        coretune: Whether to use Core-tuning or another method. Otherwise the loss is plain cross-entropy.
        accelerator: Device, processes and precision. When None, accelerate's defaults.
        config: Options of the training loop.
        optimization: train.py's settings of optimizer and schedule, which replace epochs, lr, opt and weight_decay.
        seed: Random seed. When None, that of config, and without a config the one last given to torch.manual_seed.
        method: Name of the method in timm_coretune.loss.METHODS.
        class_names: Names of the classes by index. When None, those of the data sets of the loaders, if they have
            `classes` or `class_to_idx`.
        data_config: Preparation of images, as timm.data.create_transform takes it. When None, that of the transform of
            the validation loader's data set, or of the training's, if it has steps that timm can repeat.
        progress: Print a line after each epoch, and show bars on a terminal or in a notebook.
        **loss_kwargs: Arguments of its loss, such as contrast_weight.

    Returns:
        A sequence with a dictionary for each validated epoch: its index 'epoch', and the metrics 'train' and
        'validation'. It has `predict(images)`, `save(folder)` and `push(repo_id)` for the tuned model.

    Raises:
        ValueError: The model is not a classifier, an argument is out of range, or accelerate accumulates by itself.
        DivergedError: A loss was not finite.
    """
    if loss_kwargs and not coretune:
        raise ValueError(f'Arguments of Core-tuning need coretune=True: {sorted(loss_kwargs)}.')
    loaders = [loader for loader in (validation_loader, train_loader) if loader is not None]
    if class_names is not None:
        check_names(model, class_names)
    accelerator = accelerator or Accelerator()
    if config is None:
        config = LoopConfig(seed=torch.initial_seed())
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    if validation_loader is None:
        config = dataclasses.replace(config, eval_metric='loss')
    config = dataclasses.replace(config, progress=config.progress and progress)
    config, optimization = _with_one_accumulation(
        config,
        optimization
        or OptimizationSettings(
            epochs=epochs, lr=lr, opt=opt, weight_decay=weight_decay, sched_on_updates=True, warmup_epochs=0
        ),
    )
    with seeded(config.seed, accelerator.device):
        model.to(accelerator.device)
        if coretune:
            task: TrainingTask = CoreTuningTask(model, method, device=accelerator.device, **loss_kwargs)
        else:
            task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), device=accelerator.device)
        num_batches = -(-len(train_loader) // config.contrast_batches)
        lr = optimization.lr or resolve_lr(
            optimization,
            _batch_size_of(train_loader) * config.contrast_batches,
            accelerator.num_processes,
            num_batches,
        )
        optimizer = create_optimizer(optimization, task, lr)
        updates_per_epoch = -(-num_batches // config.grad_accum_steps)
        scheduler, num_epochs = create_schedule(
            optimization, optimizer, updates_per_epoch, config.eval_metric, config.seed
        )  # fmt: skip
        if isinstance(task, CoreTuningTask):
            task.attach_optimizer(optimizer)
            task.start(num_epochs * updates_per_epoch)
        trainer = Trainer(
            task,
            optimizer,
            accelerator,
            scheduler=scheduler,
            config=config,
            clip_gradients=functools.partial(clip_gradients, optimization, accelerator, task),
            record=_EpochLines(num_epochs) if progress and accelerator.is_main_process else None,
        )
        results = trainer.fit(train_loader, validation_loader, range(num_epochs))
        return FineTuned(
            model,
            results,
            _names_of(model, loaders) if class_names is None else class_names,
            _preparation_of(loaders) if data_config is None else data_config,
        )
