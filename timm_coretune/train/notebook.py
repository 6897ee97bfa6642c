"""train.py's loop for a notebook or another script: a model and two loaders"""

from typing import Any, Dict, List, Optional

import torch.nn as nn
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

from ..task import CoreTuningTask
from .loop import LoopConfig, Trainer


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
    **loss_kwargs,
) -> List[Dict[str, Any]]:
    """Tune a timm classifier in place, by default with Core-tuning, cosine schedule and what accelerate finds.

    Args:
        model: A timm classifier with its checkpoint loaded.
        train_loader: Batches of images (B, 3, H, W) and class indices (B,), all of the same size on all processes.
        validation_loader: The same to validate on; without it the training loss decides on the best.
        epochs: Epochs to train.
        lr: Learning rate at the start.
        opt: Optimizer by timm's name.
        weight_decay: Weight decay.
        coretune: Core-tuning, or plain cross-entropy tuning to compare with.
        accelerator: Device, processes and precision; created with accelerate's defaults when None.
        config: How to train and validate.
        **loss_kwargs: Arguments of CoreTuningLoss, such as contrast_weight.

    Returns:
        For each epoch its index, 'epoch', and the metrics of 'train' and 'validation'.

    Raises:
        ValueError: The model is no classifier, or an argument is out of range.
        DivergedError: A loss was not finite.
    """
    accelerator = accelerator or Accelerator()
    model.to(accelerator.device)
    if coretune:
        task = CoreTuningTask(model, device=accelerator.device, **loss_kwargs)
    elif loss_kwargs:
        raise ValueError(f'Arguments of Core-tuning need coretune=True: {sorted(loss_kwargs)}.')
    else:
        task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), device=accelerator.device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt=opt, lr=lr, weight_decay=weight_decay)
    config = config or LoopConfig(eval_metric='loss' if validation_loader is None else 'top1')
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        step_on_epochs=False,
        updates_per_epoch=-(-len(train_loader) // config.grad_accum_steps),
    )
    trainer = Trainer(task, optimizer, accelerator, scheduler=scheduler, config=config)
    return trainer.fit(train_loader, validation_loader, range(num_epochs))
