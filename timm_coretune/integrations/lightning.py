"""Core-tuning as a LightningModule"""

from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn

from ..loss import TaskLoss
from ..task import CoreTuningTask

try:
    from lightning.pytorch import LightningModule
except ImportError as e:
    raise ImportError(f"CoreTuningModule needs lightning ({e}): pip install 'timm-coretune[lightning]'") from e


class CoreTuningModule(LightningModule):
    """Fine-tunes a timm classifier in Lightning's Trainer, with a loss on its features and logits.

    Batches are pairs of images (B, 3, H, W) and targets, as for CoreTuningTask. Processes may run in
    DistributedDataParallel (`strategy='ddp'`). A checkpoint of Lightning holds the loss too, so a resumed run continues
    with its projection head and random generator. `model` is the plain timm model. Another one gets the weights of a
    checkpoint of Lightning by `timm_coretune.load_checkpoint(model, FILE, load_classifier=True)`.

    Args:
        model: A timm classifier with num_classes > 0.
        optimizer: Creates the optimizer of a module that holds model and loss, such as
            `functools.partial(timm.optim.create_optimizer_v2, opt='adamw', lr=1e-3)`. A subclass may define
            `configure_optimizers` instead, where `self.task.get_trainable_module()` is that module.
        criterion: The loss, or its name in timm_coretune.loss.METHODS, such as 'scl'. When None, a CoreTuningLoss.
        **loss_kwargs: Arguments of the loss except num_features, which follows from the model.

    Raises:
        ValueError: As CoreTuningTask.

    Examples:

        ```python
        module = CoreTuningModule(model, lambda module: torch.optim.SGD(module.parameters(), lr=0.05))
        lightning.Trainer(max_epochs=10).fit(module, train_loader, validation_loader)
        timm_weights = module.model.state_dict()
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optional[Callable[[Any], torch.optim.Optimizer]] = None,
        criterion: Union[TaskLoss, str, None] = None,
        **loss_kwargs: Any,
    ):
        super().__init__()
        self.task = CoreTuningTask(model, criterion, verbose=False, **loss_kwargs)
        self._create_optimizer = optimizer
        self._evaluator: Any = None

    @property
    def model(self) -> nn.Module:
        """The plain timm model."""
        module: Any = self.task.get_trainable_module()
        return module.model

    def forward(self, input: Any) -> torch.Tensor:
        return self.model(input)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self._create_optimizer is None:
            raise ValueError('Expected optimizer=... of CoreTuningModule, or a subclass with configure_optimizers().')
        return self._create_optimizer(self.task.get_trainable_module())

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            self.task.attach_optimizer(optimizer)
        num_updates = self.trainer.estimated_stepping_batches
        if num_updates < float('inf'):
            self.task.start(int(num_updates))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        input, target = batch
        losses: Dict[str, torch.Tensor] = self.task(input, target)
        parts = {f'train_{name}': loss.detach() for name, loss in losses.items() if name != 'output'}
        self.log_dict(parts, prog_bar=True, batch_size=len(target))
        return losses['loss']

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.task.after_update()

    def on_validation_epoch_start(self) -> None:
        self._evaluator = self.task.create_evaluator()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        input, target = batch
        self._evaluator.update(self(input), target)

    def on_validation_epoch_end(self) -> None:
        scores = self._evaluator.compute(distributed=self.trainer.world_size > 1)
        # all processes have the same scores; sync_dist tells Lightning that they need no more than their average
        self.log_dict({f'val_{name}': value for name, value in scores.items()}, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0] if isinstance(batch, (list, tuple)) else batch)
