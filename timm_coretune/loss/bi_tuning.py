"""Contrast of prototypes and instances beside the cross-entropy (Bi-tuning)

Paper: `Bi-tuning of Pre-trained Representations`
    - Jincheng Zhong et al., 2020, https://arxiv.org/abs/2011.06182

Written from the formulas of the paper and of its authors' Transfer-Learning-Library (MIT). Different here: queries and
keys see the same view of an image, where they use two. The keys of a batch enter the queue before its loss, so that the
images of a batch are compared too. Empty places of the queue are left out, where they start with random keys. Their
classifier and projector have their own learning rates.

Cost: one more forward pass without gradient in a step, a second set of weights, and a queue of queue_size keys of
D + 1 + P numbers for each class. With 1,000 classes and 2,048 features these are 350 MB.
"""

from typing import Any, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..distributed import GlobalBatch
from ..mining import at_least_float32, hard_label, normalize
from ..timm_model import get_classifiers
from .base import TaskLoss
from .parts.bank import Bank
from .parts.pretrained import MomentumEncoder


class BiTuningLoss(TaskLoss):
    """Cross-entropy + contrast_weight x (contrast of prototypes + contrast of instances).

    Keys are features of a momentum encoder, and their projections. Both contrasts are softmaxes over all keys, averaged
    over the positives, which are the keys of the image's class. The instance contrast compares the projection of an
    image with those of the keys. The prototype contrast compares the classifier's weights of the image's class, with
    its bias, with the features of the keys and of the image itself, which is a positive too. As in the released code,
    its gradient flows into the features of the image alone.

    With weights in bfloat16, most steps of the momentum encoder are too small to be stored. Use autocast instead.

    Args:
        num_features: Width D of the pre-logits features.
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
    contrasts = True
    for_pixels = False
    keeps_copy = True

    def __init__(
        self,
        num_features: int,
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
        self.num_features = num_features
        self.contrast_weight = contrast_weight
        self.temperature = temperature
        self.queue_size = queue_size
        self.momentum = momentum
        self.projector = nn.Linear(num_features, projection_dim)
        self.encoder: Optional[MomentumEncoder] = None
        self.queue: Optional[Bank] = None

    def attach(self, model: nn.Module) -> None:
        """Copy the model. Raises a ValueError if its classifier is not one linear layer."""
        classifiers = get_classifiers(model)
        if len(classifiers) != 1 or not isinstance(classifiers[0], (nn.Linear, nn.Conv2d)):
            raise ValueError(
                'Expected a model with one linear classifier, whose weights are the prototypes of the classes, got '
                f'{type(model).__name__} with {", ".join(type(c).__name__ for c in classifiers)}.'
            )
        num_classes, num_features = classifiers[0].weight.shape[:2]
        self.encoder = MomentumEncoder(model, self.projector, self.momentum, self.num_features)
        widths = {'feature': num_features + 1, 'projection': self.projector.out_features}
        self.queue = Bank(self.queue_size, widths, num_classes)

    def extra_repr(self) -> str:
        return (
            f'contrast_weight={self.contrast_weight}, temperature={self.temperature}, queue_size={self.queue_size}, '
            f'momentum={self.momentum}'
        )

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
        encoder, queue = self.attached(self.encoder), self.attached(self.queue)
        self.check_given(input=input, classifier=classifier)
        batch: GlobalBatch = prepared[0]
        own_label = hard_label(target)
        label = batch.gather(own_label)
        task_loss = self.cross_entropy(logits, target, label, batch, clean_loss)
        key = encoder(input).to(self.projector.weight.dtype)
        key_projection = normalize(encoder.projector(key))
        queue.add(label, label, feature=batch.gather(_unit(key)), projection=batch.gather(key_projection))

        weight, bias = classifier.weight.detach().flatten(1), classifier.bias
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()
        row = own_label.clamp(min=0)
        prototype = _unit(weight.index_select(0, row), bias.index_select(0, row))
        query = _unit(features)
        projection = normalize(self.projector(features.to(self.projector.weight.dtype)))
        with torch.autocast(device_type=features.device.type, enabled=False):
            # copies, for the next step overwrites rows of the queue
            to_keys = prototype @ queue.feature.to(query.dtype).T
            to_itself = (prototype * query).sum(dim=1, keepdim=True)
            between = projection @ queue.projection.to(projection.dtype, copy=True).T
            positive = own_label[:, None] == queue.label
            empty = (queue.label < 0).expand_as(positive)
            prototype_loss = self.contrast(
                torch.cat([to_itself, to_keys], dim=1), F.pad(positive, (1, 0), value=True), F.pad(empty, (1, 0))
            )
            instance_loss = self.contrast(between, positive, empty)
        labelled = own_label >= 0
        prototype_loss = batch.mean(prototype_loss.masked_fill(~labelled, 0.0).sum(), label)
        instance_loss = batch.mean(instance_loss.masked_fill(~labelled, 0.0).sum(), label)
        return {
            'loss': task_loss + self.contrast_weight * (prototype_loss + instance_loss),
            'task_loss': task_loss,
            'prototype_loss': prototype_loss,
            'instance_loss': instance_loss,
        }

    def contrast(self, similarity: torch.Tensor, positive: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """-log p of the positives, averaged over them (B,), where p is a softmax over all that is not empty (B, M)."""
        lowest = torch.finfo(similarity.dtype).min
        log_p = (similarity / self.temperature).masked_fill(empty, lowest).log_softmax(dim=1)
        return -log_p.masked_fill(~positive, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)


def _unit(features: torch.Tensor, last: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Features (N, D) with one more number, by default 1, scaled to length 1, in float32 or better (N, D + 1)."""
    last = torch.ones_like(features[:, 0]) if last is None else last
    return F.normalize(torch.cat([at_least_float32(features), at_least_float32(last)[:, None]], dim=1), dim=1)
