"""Averages of the training losses, kept on the device so that no step has to wait for it"""

from collections import OrderedDict
from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
from accelerate import Accelerator

from .cli.errors import DivergedError


class LossMeter:
    """Averages the losses of a task and notices the first step whose losses are not finite.

    A step stacks its losses into one tensor, and nothing else is computed on the device. They move to the CPU and are
    added up when somebody asks for them.

    Args:
        accelerator: Device and processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.names: Tuple[str, ...] = ()
        self.num_steps = 0
        self.waiting: List[torch.Tensor] = []  # losses of the steps that are not added yet, on the device
        self.steps: List[int] = []  # the numbers of these steps
        self.bad_step: Optional[int] = None

    def _start(self, names: Iterable[str]) -> None:
        # in the log 'task_loss' is called 'task', and the total stays 'loss'
        self.names = tuple(name.removesuffix('_loss') for name in names)
        self.total = torch.zeros(len(self.names))
        self.last = torch.full((len(self.names),), float('nan'))
        self.last_finite = self.last.clone()

    def update(self, result: Dict[str, torch.Tensor], step: int) -> None:
        """Add the losses of one step, from the dictionary that the task returned."""
        losses = {k: v for k, v in result.items() if k.endswith('loss')}
        if not self.names:
            self._start(losses)
        self.waiting.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        self.steps.append(step)
        self.num_steps += 1

    def _add(self) -> None:
        """Add the losses that wait, in the order of the steps: sums do not depend on when they are asked for."""
        if not self.waiting:
            return
        for step, losses in zip(self.steps, torch.stack(self.waiting).cpu(), strict=True):
            self.total = self.total + losses
            self.last = losses
            if self.bad_step is None:
                if torch.isfinite(losses).all():
                    self.last_finite = losses
                else:
                    self.bad_step = step
        self.waiting, self.steps = [], []

    def check(self) -> None:
        """Raise an error if training has diverged. All processes must call this together.

        Raises:
            DivergedError: A loss was not finite. The message gives the update and the last finite losses.
        """
        self._add()
        bad_step = -1.0 if self.bad_step is None else float(self.bad_step)
        values = torch.tensor([[*self.last_finite, bad_step]], device=self.accelerator.device)
        rows: List[List[float]] = self.accelerator.gather(values).tolist()
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
        self._add()
        return dict(names=list(self.names), total=self.total.tolist(), num_steps=self.num_steps)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._start(state['names'])
        self.total += torch.tensor(state['total'])
        self.num_steps = state['num_steps']

    def _by_name(self, values: torch.Tensor) -> Dict[str, float]:
        mean = self.accelerator.reduce(values.to(self.accelerator.device), 'mean')
        return OrderedDict(zip(self.names, mean.tolist(), strict=True))

    def now(self) -> Dict[str, float]:
        """Losses of the last step, averaged over all processes."""
        self._add()
        return self._by_name(self.last)

    def last_losses(self) -> Dict[str, float]:
        """Losses of the last step of this process."""
        self._add()
        return dict(zip(self.names, self.last.tolist(), strict=True))

    def average(self) -> Dict[str, float]:
        """Losses averaged over all steps so far and all processes."""
        self._add()
        return self._by_name(self.total / self.num_steps)
