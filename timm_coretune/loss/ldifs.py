"""Distance to the features of the pretrained model (LDIFS)

Paper: `Fine-tuning can cripple your foundation model; preserving features may be the solution`
    - Jishnu Mukhoti et al., TMLR 2024, https://arxiv.org/abs/2308.13320

Here the distance of two unit vectors is summed over their entries, so its range, 0 to 4, does not depend on their
width. The released code averages over the entries, and over tokens without pooling them. With batch norm the distance
is not 0 before tuning: the model that trains uses the statistics of the batch, its copy those of pretraining.

Cost: one more forward pass without gradient in a step, and a second set of weights.
"""

from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from ..distributed import GlobalBatch
from ..mining import hard_label, normalize
from ..timm_model import resolve_num_features
from .base import TaskLoss
from .parts.pretrained import PretrainedFeatures

_NUM_BLOCKS = 4  # of a model whose feature maps all have one size


class LDIFSLoss(TaskLoss):
    """Cross-entropy + weight x mean squared distance of features to those of the model before tuning.

    The features are averages over the feature maps at the end of each stage, and the input of the classifier. Each is
    scaled to length 1, and the squared distances are averaged over these layers and over the batch. A model whose maps
    have one size, such as a vision transformer, has no stages: the ends of its four quarters are taken.

    Args:
        num_features: Width D of the pre-logits features, or the model.
        weight: Weight of the distance, > 0.
        **kwargs: Arguments of TaskLoss.

    Raises:
        ValueError: An argument is out of its range.
    """

    requires = ('input', 'maps')
    for_pixels = False
    keeps_copy = True

    def __init__(self, num_features: Union[int, nn.Module], weight: float = 10.0, **kwargs: Any):
        super().__init__(**kwargs)
        if not weight > 0.0:
            raise ValueError(f'Expected weight > 0, got {weight}. Without it this method is plain cross-entropy.')
        self.num_features = resolve_num_features(num_features)
        self.weight = weight
        self.pretrained: Optional[PretrainedFeatures] = None

    def attach(self, model: nn.Module) -> None:
        """Copy the model. Raises a ValueError if it does not offer its feature maps."""
        self.map_indices = choose_maps(model)
        self.pretrained = PretrainedFeatures(model, self.num_features)

    def extra_repr(self) -> str:
        return f'weight={self.weight}'

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
        input: Optional[torch.Tensor] = None,
        maps: Optional[List[torch.Tensor]] = None,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        """Compute the losses, given the images, and of each chosen feature map its average (B, D_l)."""
        pretrained = self.attached(self.pretrained)
        self.check_given(input=input, maps=maps)
        batch: GlobalBatch = prepared[0]
        own_label = hard_label(target)
        label = batch.gather(own_label)
        task_loss = self.cross_entropy(logits, target, label, batch, clean_loss)
        pretrained_maps, pretrained_features = pretrained.forward_maps(input, self.map_indices)
        pairs = zip([*(maps or []), features], [*pretrained_maps, pretrained_features], strict=True)
        distance = torch.stack([(normalize(a) - normalize(b)).square().sum(dim=1) for a, b in pairs]).mean(dim=0)
        distance_loss = batch.mean(distance.masked_fill(own_label < 0, 0.0).sum(), label)
        return {
            'loss': task_loss + self.weight * distance_loss,
            'task_loss': task_loss,
            'distance_loss': distance_loss,
        }


def choose_maps(model: nn.Module) -> Tuple[int, ...]:
    """Indices of the last feature map of each size, or of the ends of four quarters if all have one size.

    Raises:
        ValueError: The model does not offer feature maps.
    """
    infos: List[Dict[str, Any]] = list(getattr(model, 'feature_info', None) or [])
    if not infos or not hasattr(model, 'forward_intermediates'):
        raise ValueError(
            f'Expected a timm model with feature_info and forward_intermediates, whose feature maps are compared, got '
            f'{type(model).__name__} without. Use another model, or --method l2-sp, which compares weights.'
        )
    reductions = [info['reduction'] for info in infos]
    if len(set(reductions)) == 1:
        count = min(_NUM_BLOCKS, len(infos))
        return tuple(len(infos) * (i + 1) // count - 1 for i in range(count))
    return tuple(i for i, reduction in enumerate(reductions) if reduction not in reductions[i + 1 :])
