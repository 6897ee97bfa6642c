"""Selective projection decay (SPD)

Paper: `Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models`
    - Junjiao Tian, Chengyue Huang, Zsolt Kira, NeurIPS 2024, https://arxiv.org/abs/2411.01713

Written from the formula. The paper builds it into Adam. Here it corrects the updates of any optimizer.
"""

from typing import Any, Dict, List, Optional, Tuple, Union, cast

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..distributed import GlobalBatch
from ..mining import at_least_float32, hard_label
from .base import TaskLoss
from .parts.pretrained import PretrainedWeights


class SPDLoss(TaskLoss):
    """Cross-entropy, and a decay towards the pretrained weights of those that move away against their gradient.

    Let w0 be a pretrained tensor of weights, w its value before an update, w+ after it, and g its gradient. If
    g.(w - w0) > 0, so that the gradient leads back to w0, then w+ -= weight x r (w+ - w0), where
    r = 1 - |w - w0| / |w+ - w0|, but at least 0. With weight 1 the distance from w0 does not grow then. The decision is
    taken for each tensor. w0 are the weights when the loss met the model. The classifier, and in segmentation the
    decoder, are left alone.

    It takes the place of weight decay, so train with `--weight-decay 0`. In a loop of your own call `attach(model)` and
    `attach_optimizer(optimizer, model)` before the first step.

    A step costs a few passes over the weights. A copy of w0 stays in memory, and is saved with the training state.

    Args:
        num_features: Width D of the pre-logits features, or the model. The loss takes any, and does not look at them.
        weight: How much of the growth of the distance is taken back, >= 0. Adaptive optimizers may need less than 1.
        **kwargs: Arguments of TaskLoss.

    Raises:
        ValueError: weight is negative.
    """

    keeps_copy = True
    pretrained: Optional[PretrainedWeights]

    def __init__(self, num_features: Union[int, nn.Module], weight: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        if not weight >= 0.0:
            raise ValueError(f'Expected weight >= 0, got {weight}. 0 is plain cross-entropy.')
        self.weight = weight
        self.pretrained = None
        self.has_optimizer = False

    def extra_repr(self) -> str:
        return f'weight={self.weight}'

    def attach(self, model: nn.Module) -> None:
        """Keep a copy of the pretrained weights."""
        self.pretrained = PretrainedWeights(model)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Correct every update of an optimizer.

        Raises:
            RuntimeError: attach was not called.
            ValueError: The optimizer does not call hooks.
        """
        pretrained: PretrainedWeights = self.attached(self.pretrained)
        # that in accelerate's wrapper, and that in timm's Lookahead, as neither wrapper calls hooks
        inner: torch.optim.Optimizer = getattr(optimizer, 'optimizer', optimizer)
        inner = getattr(inner, '_base_optimizer', inner)
        if not getattr(type(inner).step, 'hooked', False):
            raise ValueError(
                f'Expected an optimizer whose step calls its hooks, as those of torch and timm do, got '
                f'{type(inner).__name__}. Call torch.optim.Optimizer.__init__ in its own, or use another one.'
            )
        correction = _Correction(pretrained, unwrap_model(model), self.weight)
        inner.register_step_pre_hook(correction.before)
        inner.register_step_post_hook(correction.after)
        self.has_optimizer = True

    def prepare(self, batch_size: int, device: torch.device, rows_per_image: int = 1) -> Tuple[Any, ...]:
        if not self.has_optimizer:
            raise RuntimeError(
                'Expected an optimizer to correct. Call attach_optimizer of the task or the loss before the first step.'
            )
        return super().prepare(batch_size, device, rows_per_image)

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        batch: GlobalBatch = prepared[0]
        task_loss = self.cross_entropy(logits, target, batch.gather(hard_label(target)), batch, clean_loss)
        return {'loss': task_loss, 'task_loss': task_loss}


class _Correction:
    """Measures the weights before an update, and corrects them after it. It never waits for the device."""

    def __init__(self, pretrained: PretrainedWeights, model: nn.Module, weight: float):
        self.pretrained = pretrained
        self.model = model
        self.weight = weight
        self.pairs: List[Tuple[nn.Parameter, torch.Tensor]] = []
        self.distance = self.leads_back = torch.empty(0)

    def changes(self) -> List[torch.Tensor]:
        """How far each weight is from its pretrained value. Differences in half precision would be too coarse."""
        return [at_least_float32(p) - at_least_float32(p0) for p, p0 in self.pairs]

    @torch.no_grad()
    def before(self, *args: Any) -> None:
        self.pairs = [(p, p0) for p, p0 in self.pretrained.pairs(self.model) if p.grad is not None]
        if self.pairs:
            changes = self.changes()
            self.distance = torch.stack([change.norm() for change in changes])
            gradients = [cast(torch.Tensor, p.grad) for p, _ in self.pairs]
            dots = [(grad * change).sum() for grad, change in zip(gradients, changes, strict=True)]
            self.leads_back = torch.stack(dots) > 0

    @torch.no_grad()
    def after(self, *args: Any) -> None:
        if self.pairs:
            changes = self.changes()
            distance = torch.stack([change.norm() for change in changes])
            ratio = (1 - self.distance / distance).clamp(min=0).where(self.leads_back & (distance > 0), 0.0)
            for (p, _), change, share in zip(self.pairs, changes, (self.weight * ratio).unbind(), strict=True):
                p.sub_(change * share)
