"""The training loop of train.py for a notebook or script that has a model and two loaders"""

import functools
from typing import Any, Dict, List, Optional

import torch.nn as nn
from accelerate import Accelerator
from timm.task import ClassificationTask, TrainingTask

from ..task import CoreTuningTask
from .cli.settings import OptimizationSettings
from .loop import LoopConfig, Trainer
from .optimization import clip_gradients, create_optimizer, create_schedule, resolve_lr


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
    **loss_kwargs: Any,
) -> List[Dict[str, Any]]:
    """Fine-tune a timm classifier in place, by default with Core-tuning and a cosine schedule.

    Args:
        model: A timm classifier with its checkpoint loaded.
        train_loader: Batches of float images (B, 3, H, W) and int64 class indices (B,), with one B on all processes.
        validation_loader: Batches to validate on. When None, the training loss selects the best epoch.
        epochs: Number of epochs.
        lr: Learning rate at the start.
        opt: Name of a timm optimizer.
        weight_decay: Weight decay.
        coretune: Whether to use Core-tuning. Otherwise the loss is plain cross-entropy.
        accelerator: Device, processes and precision. When None, accelerate's defaults.
        config: Options of the training loop.
        optimization: train.py's settings of optimizer and schedule, which replace epochs, lr, opt and weight_decay.
        **loss_kwargs: Arguments of CoreTuningLoss, such as contrast_weight.

    Returns:
        A dictionary for each validated epoch: its index 'epoch', and the metrics 'train' and 'validation'.

    Raises:
        ValueError: The model is not a classifier, or an argument is out of range.
        DivergedError: A loss was not finite.
    """
    accelerator = accelerator or Accelerator()
    model.to(accelerator.device)
    if coretune:
        task: TrainingTask = CoreTuningTask(model, device=accelerator.device, **loss_kwargs)
    elif loss_kwargs:
        raise ValueError(f'Arguments of Core-tuning need coretune=True: {sorted(loss_kwargs)}.')
    else:
        task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), device=accelerator.device)
    config = config or LoopConfig(eval_metric='loss' if validation_loader is None else 'top1')
    optimization = optimization or OptimizationSettings(
        epochs=epochs,
        lr=lr,
        opt=opt,
        weight_decay=weight_decay,
        grad_accum_steps=config.grad_accum_steps,
        sched_on_updates=True,
        warmup_epochs=0,
    )
    batch_size = getattr(train_loader, 'batch_size', None) or 1
    lr = resolve_lr(optimization, batch_size, accelerator.num_processes)
    optimizer = create_optimizer(optimization, task, lr)
    updates_per_epoch = -(-len(train_loader) // config.grad_accum_steps)
    scheduler, num_epochs = create_schedule(
        optimization, optimizer, updates_per_epoch, config.eval_metric, config.seed
    )  # fmt: skip
    trainer = Trainer(
        task,
        optimizer,
        accelerator,
        scheduler=scheduler,
        config=config,
        clip_gradients=functools.partial(clip_gradients, optimization, accelerator, task),
    )
    return trainer.fit(train_loader, validation_loader, range(num_epochs))
