"""L2 penalty on the distance from the starting point (L2-SP)

Paper: `Explicit Inductive Bias for Transfer Learning with Convolutional Networks`
    - Xuhong Li, Yves Grandvalet, Franck Davoine, ICML 2018, https://arxiv.org/abs/1802.01483

Written from the formula. Left out are the variants that weigh each parameter by its Fisher information, or group them.
"""

from typing import Any, Dict, List, Optional, Union

import torch
import torch.nn as nn

from ..distributed import GlobalBatch
from ..mining import at_least_float32, hard_label
from ..timm_model import classifier_parameters
from .base import TaskLoss
from .parts.pretrained import PretrainedWeights


class L2SPLoss(TaskLoss):
    """Cross-entropy + weight / 2 x |w - w0|^2 + head_weight / 2 x |v|^2.

    w are the parameters that were pretrained, and w0 their values when the loss met the model: all parameters but those
    of the classifier, and in segmentation of the decoder. v are the weights of these new layers. Their biases and norms
    are left out, as timm leaves them out of weight decay.

    It takes the place of weight decay, so train with `--weight-decay 0`. In a loop of your own call `attach(model)`
    before the first step, and pass `model=model` in each.

    A step costs one pass over the weights. A copy of w0 stays in memory, and is saved with the training state.

    Args:
        num_features: Width D of the pre-logits features, or the model. The loss takes any, and does not look at them.
        weight: Weight of the distance from the starting point, >= 0. The paper searches 0.001 to 1.
        head_weight: Weight of the norm of the new layers, >= 0.
        **kwargs: Arguments of TaskLoss.

    Raises:
        ValueError: A weight is negative.
    """

    requires = ('model',)
    keeps_copy = True
    pretrained: Optional[PretrainedWeights]

    def __init__(
        self, num_features: Union[int, nn.Module], weight: float = 0.1, head_weight: float = 0.01, **kwargs: Any
    ):
        super().__init__(**kwargs)
        if not weight >= 0.0 or not head_weight >= 0.0:
            raise ValueError(f'Expected weight and head_weight >= 0, got {weight} and {head_weight}.')
        self.weight = weight
        self.head_weight = head_weight
        self.pretrained = None

    def extra_repr(self) -> str:
        return f'weight={self.weight}, head_weight={self.head_weight}'

    def attach(self, model: nn.Module) -> None:
        """Keep a copy of the pretrained weights."""
        self.pretrained = PretrainedWeights(model)

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        pretrained: PretrainedWeights = self.attached(self.pretrained)
        batch: GlobalBatch = prepared[0]
        task_loss = self.cross_entropy(logits, target, batch.gather(hard_label(target)), batch, clean_loss)
        model: nn.Module = further['model']
        distance_loss = _half_norm([p - p0 for p, p0 in pretrained.pairs(model)], task_loss)
        head_loss = _half_norm([p for p in classifier_parameters(model) if p.ndim > 1], task_loss)
        return {
            'loss': task_loss + self.weight * distance_loss + self.head_weight * head_loss,
            'task_loss': task_loss,
            'distance_loss': distance_loss,
            'head_loss': head_loss,
        }


def _half_norm(tensors: List[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Half of the squared norm of all tensors together, a scalar."""
    squares = [at_least_float32(tensor).square().sum() for tensor in tensors]
    return 0.5 * torch.stack(squares).sum() if squares else torch.zeros_like(like)
