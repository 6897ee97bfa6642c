"""What the training loop tells while it runs"""

from typing import Any, Dict, Optional, Sequence

import torch

from ..data.batches import Input
from .diverged import Place, StateBefore


class Record:
    """Is told by the training loop what it does. Here all of it is ignored; a subclass has what it has a use for.

    The first argument `trainer` is the `Trainer` whose loop it is.
    """

    def save_start(self, features: Dict[str, float]) -> None:
        """Figures of the features before the first epoch."""

    def save_images(self, input: Any, batch_idx: int) -> None:
        """A batch as it went into the model, whenever a line of the log is due."""

    def log_step(self, values: Dict[str, float], step: int) -> None:
        """Losses and learning rate of an update, whenever a line of the log is due."""

    def save_recovery(self, trainer: Any, epoch: int, update: int) -> None:
        """A state in the middle of an epoch is due."""

    def save_epoch(
        self,
        trainer: Any,
        epoch: int,
        is_best: bool,
        train_metrics: Dict[str, float],
        eval_metrics: Optional[Dict[str, float]],
        features: Optional[Dict[str, float]] = None,
    ) -> None:
        """An epoch is over, with its scores if it was validated and its features if they were measured."""

    def keep_step(
        self,
        trainer: Any,
        before: StateBefore,
        inputs: Sequence[Input],
        target: torch.Tensor,
        losses: Dict[str, float],
        place: Place,
    ) -> str:
        """A step diverged. Returns a sentence about what was kept of it."""
        return 'Nothing of the step was kept.'
