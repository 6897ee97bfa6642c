"""Contrast of prototypes and instances beside the cross-entropy (Bi-tuning)

Paper: `Bi-tuning of Pre-trained Representations`
    - Jincheng Zhong et al., 2020, https://arxiv.org/abs/2011.06182

Written from the formulas, as its authors' Transfer-Learning-Library has them. Different here: queries and keys see the
same view of an image, where they use two. The keys of a batch enter the queue before its loss, so that the images of a
batch are compared too. Empty places of the queue are left out, where they start with random keys. Left out are learning
rates of their own for classifier and projector.

Cost: one more forward pass without gradient in a step, a second set of weights, and a queue of queue_size keys of
D + 1 + P numbers for each class. With 1,000 classes and 2,048 features these are 350 MB.
"""

from typing import Any, Dict, Optional, Union, cast

import torch
import torch.nn as nn

from ..distributed import GlobalBatch
from ..mining import hard_label, normalize
from ..timm_model import get_classifiers, resolve_num_features
from .base import TaskLoss
from .parts.bank import Bank
from .parts.pretrained import MomentumEncoder


class BiTuningLoss(TaskLoss):
    """Cross-entropy + contrast_weight x (contrast of prototypes + contrast of instances).

    Keys are features of a momentum encoder, and their projections. Both contrasts are softmaxes over all keys, averaged
    over the positives, the keys of the image's class. That of instances compares the projection of an image with those
    of the keys. That of prototypes compares the weights and bias of the image's class with the features of the keys and
    of the image, a positive too. As in the released code, its gradient flows into the features of the image alone.
    With weights in bfloat16, most steps of the momentum encoder are too small to be stored. Use autocast instead.

    Args:
        num_features: Width D of the pre-logits features, or the model.
        contrast_weight: Weight of both contrasts, > 0.
        temperature: Divides the cosine similarities, > 0.
        projection_dim: Width P of the projection, by one linear layer.
        queue_size: Number of keys of a class, >= 1.
        momentum: Share of the old weights in the new ones of the momentum encoder, in [0, 1].
        **kwargs: Arguments of TaskLoss. `gather` must be True.

    Raises:
        ValueError: An argument is out of its range.
    """

    requires = ('input', 'classifier')
    for_pixels = False
    for_multi_label = False
    keeps_copy = True

    def __init__(
        self,
        num_features: Union[int, nn.Module],
        contrast_weight: float = 1.0,
        temperature: float = 0.07,
        projection_dim: int = 128,
        queue_size: int = 40,
        momentum: float = 0.999,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.check_gather()
        if not contrast_weight > 0.0 or not temperature > 0.0 or not 0.0 <= momentum <= 1.0:
            raise ValueError(
                'Expected contrast_weight and temperature > 0 and momentum in [0, 1], got '
                f'{contrast_weight}, {temperature} and {momentum}.'
            )
        self.num_features = resolve_num_features(num_features)
        self.contrast_weight, self.temperature = contrast_weight, temperature
        self.queue_size, self.momentum = queue_size, momentum
        self.projector = nn.Linear(self.num_features, projection_dim)
        self.encoder: Any = None  # created by attach(), as the queue

    def attach(self, model: nn.Module) -> None:
        """Copy the model. Raises a ValueError if its classifier is not one linear layer."""
        classifiers = get_classifiers(model)
        if len(classifiers) != 1 or not isinstance(classifiers[0], (nn.Linear, nn.Conv2d)):
            names = ', '.join(type(c).__name__ for c in classifiers)
            raise ValueError(f'Expected a model with one linear classifier, got {type(model).__name__} with {names}.')
        num_classes, num_features = classifiers[0].weight.shape[:2]
        self.encoder = MomentumEncoder(model, self.projector, self.momentum, self.num_features)
        columns = {'feature': num_features + 1, 'projection': self.projector.out_features}
        self.queue = Bank(self.queue_size, columns, num_classes)

    def extra_repr(self) -> str:
        return f'contrast_weight={self.contrast_weight}, temperature={self.temperature}, queue_size={self.queue_size}'

    def after_update(self, model: nn.Module) -> None:
        self.attached(self.encoder).follow(model, self.projector)

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
        input: Any = None,
        classifier: Any = None,
        **further: Any,
    ) -> Dict[str, torch.Tensor]:
        self.check_given(input=input, classifier=classifier)
        encoder, queue = self.attached(self.encoder), cast(Any, self.queue)
        batch: GlobalBatch = prepared[0]
        own_label, label = hard_label(target), batch.gather(hard_label(target))
        task_loss = self.cross_entropy(logits, target, label, batch, clean_loss)
        key = encoder(input).to(self.projector.weight.dtype)
        queue.add(batch, label, feature=_unit(key), projection=normalize(encoder.projector(key)))

        weight, bias = classifier.weight.detach().flatten(1), classifier.bias
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()
        prototype = _unit(weight, bias).index_select(0, own_label.clamp(min=0))
        projection = normalize(self.projector(features.to(self.projector.weight.dtype)))
        with torch.autocast(device_type=features.device.type, enabled=False):
            to_keys = prototype @ queue.feature.to(prototype.dtype).T
            to_itself = (prototype * _unit(features)).sum(dim=1, keepdim=True)
            # a copy, for the next step overwrites rows of the queue
            between = projection @ queue.projection.to(projection.dtype, copy=True).T
            key_label = queue.label.expand(len(features), -1)
            with_itself = torch.cat([to_itself, to_keys], dim=1), torch.cat([own_label[:, None], key_label], dim=1)
            prototype_loss = batch.mean(self.contrast(*with_itself, own_label), label)
            instance_loss = batch.mean(self.contrast(between, key_label, own_label), label)
        return {
            'loss': task_loss + self.contrast_weight * (prototype_loss + instance_loss),
            'task_loss': task_loss,
            'prototype_loss': prototype_loss,
            'instance_loss': instance_loss,
        }

    def contrast(self, similarity: torch.Tensor, key_label: torch.Tensor, own_label: torch.Tensor) -> torch.Tensor:
        """Sum over the rows with a class of the mean -log p of their positives, with a softmax p over M keys.

        Similarities and classes of keys are (B, M). Keys with a negative class are not there.
        """
        positive = (own_label[:, None] == key_label) & (key_label >= 0)
        logits = (similarity / self.temperature).masked_fill(key_label < 0, torch.finfo(similarity.dtype).min)
        log_p = logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
        return -(log_p.sum(dim=1) / positive.sum(dim=1).clamp(min=1)).sum()


def _unit(features: torch.Tensor, last: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Features (N, D) with one more number, by default 1, scaled to length 1, in float32 or better (N, D + 1)."""
    last = torch.ones_like(features[:, 0]) if last is None else last
    return normalize(torch.cat([features, last[:, None]], dim=1))
