"""Averages of the training losses, kept on the device so that no step has to wait for it"""

from collections import OrderedDict
from typing import Any, Dict, Iterable, List, Tuple

import torch
from accelerate import Accelerator


class DivergedError(ValueError):
    """A loss was not finite."""


class LossMeter:
    """Averages the losses of a task and notices the first step whose losses are not finite.

    Args:
        accelerator: Device and processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.names: Tuple[str, ...] = ()
        self.num_steps = 0

    def _start(self, names: Iterable[str]) -> None:
        # in the log 'task_loss' is called 'task', and the total stays 'loss'
        self.names = tuple(name.removesuffix('_loss') for name in names)
        device = self.accelerator.device
        self.total = torch.zeros(len(self.names), device=device)
        self.last = torch.full((len(self.names),), float('nan'), device=device)
        self.last_finite = self.last.clone()
        self.first_bad_step = torch.full((), -1.0, device=device)

    def update(self, result: Dict[str, torch.Tensor], step: int) -> None:
        """Add the losses of one step, from the dictionary that the task returned."""
        losses = {k: v for k, v in result.items() if k.endswith('loss')}
        if not self.names:
            self._start(losses)
        self.last = torch.stack([loss.detach().float() for loss in losses.values()])
        finite = torch.isfinite(self.last).all()
        healthy = self.first_bad_step < 0
        self.first_bad_step = torch.where(healthy & ~finite, float(step), self.first_bad_step)
        self.last_finite = torch.where(healthy & finite, self.last, self.last_finite)
        self.total = self.total + self.last
        self.num_steps += 1

    def check(self) -> None:
        """Raise an error if training has diverged. All processes must call this together.

        Raises:
            DivergedError: A loss was not finite. The message gives the update and the last finite losses.
        """
        values = torch.stack([*self.last_finite, self.first_bad_step])
        rows: List[List[float]] = self.accelerator.gather(values[None]).tolist()
        for *last_finite, step in rows:
            if step >= 0:
                losses = ', '.join(f'{name} {value:.4g}' for name, value in zip(self.names, last_finite, strict=True))
                raise DivergedError(
                    f'Expected finite losses, got NaN or Inf at update {step:.0f}. The last finite losses: {losses}. '
                    'Likely the learning rate is too high (--lr), or features overflow (--amp-dtype bfloat16), or the '
                    'images hold NaN.'
                )

    def state_dict(self) -> Dict[str, Any]:
        """The sums of this process, with which it continues in the middle of an epoch."""
        return dict(names=list(self.names), total=self.total.tolist(), num_steps=self.num_steps)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._start(state['names'])
        self.total += torch.tensor(state['total'], device=self.accelerator.device)
        self.num_steps = state['num_steps']

    def _by_name(self, values: torch.Tensor) -> Dict[str, float]:
        return OrderedDict(zip(self.names, self.accelerator.reduce(values, 'mean').tolist(), strict=True))

    def now(self) -> Dict[str, float]:
        """Losses of the last step, averaged over all processes."""
        return self._by_name(self.last)

    def average(self) -> Dict[str, float]:
        """Losses averaged over all steps so far and all processes."""
        return self._by_name(self.total / self.num_steps)
