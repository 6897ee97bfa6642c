"""Distribution regularization of the classifier by pretrained features (DR-Tune)

Paper: `DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution Regularization with Semantic
Calibration`
    - Nan Zhou, Jiaxin Chen and Di Huang, ICCV 2023, https://arxiv.org/abs/2308.12058

Written from the formulas of the paper. Left out is the rotation of the pretrained features, an SVD in every step. In
the paper's ablation it adds 0.3 to 0.6 points to the class-wise shift, which is here. The bank fills in the first steps
instead of before them. The released code differs from the paper, and so from this file: it normalises features and
classifier weights, rescales the shifted features, and averages over batch and bank as one.

Cost: one more forward pass without gradient in a step, a second set of weights, and a bank of 2 K rows of features.
"""

from typing import Any, Dict, Optional, Union, cast

import torch
import torch.nn as nn

from ..distributed import GlobalBatch
from ..mining import at_least_float32, hard_label
from ..timm_model import check_classifies_rows, resolve_num_features
from .base import TaskLoss
from .parts.bank import Bank
from .parts.forward import classify
from .parts.pretrained import PretrainedFeatures


class DRTuneLoss(TaskLoss):
    """Cross-entropy + weight x cross-entropy of the classifier on shifted features of the pretrained model.

    A bank holds the features v^p of the pretrained model and v^d of the tuned one for the K images that came last. For
    a class c, mu^p_c is the mean of v^p, and mu^d_c that of v^d, weighted by a softmax of the classifier's logits of c
    over the rows of c. The classifier has to classify u = v^p + mu^d_c - mu^p_c too. No gradient flows into u: the bank
    trains the classifier alone, and the tuned features follow the classifier.

    The rows of a batch enter the bank before its loss. With soft targets, their most probable class counts.

    Args:
        num_features: Width D of the pre-logits features, or the model.
        weight: Weight of the mean cross-entropy of the bank, > 0. When None, the number of its filled rows divided by
            that of the labelled rows of the global batch, as in the paper. Each row of the bank then counts as much as
            one of the batch, so the gradient of the classifier grows by the factor 1 + K / B. Clipping gradients by
            their norm then takes most of the norm from the backbone, and Adam removes the factor again.
        bank_size: Number K of images in the bank, >= 1.
        **kwargs: Arguments of TaskLoss. `gather` must be True.

    Raises:
        ValueError: An argument is out of its range.
    """

    requires = ('input', 'classifier')
    for_pixels = False
    for_multi_label = False
    takes_classification_loss = False
    keeps_copy = True

    def __init__(
        self,
        num_features: Union[int, nn.Module],
        weight: Optional[float] = None,
        bank_size: int = 2048,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.check_gather()
        if weight is not None and not weight > 0.0:
            raise ValueError(f'Expected weight > 0, or None for that of the paper, got {weight}.')
        self.num_features = resolve_num_features(num_features)
        self.weight = weight
        self.bank: Any = Bank(bank_size, {'pretrained': self.num_features, 'tuned': self.num_features})
        self.pretrained: Optional[PretrainedFeatures] = None

    def attach(self, model: nn.Module) -> None:
        """Copy the model. Raises a ValueError if its classifier does not map features to logits."""
        check_classifies_rows(model, cast(int, self.num_features))
        self.pretrained = PretrainedFeatures(model, self.num_features)

    def extra_repr(self) -> str:
        return f'weight={self.weight}, bank_size={self.bank.size}'

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
        batch: GlobalBatch = prepared[0]
        label = batch.gather(hard_label(target))
        task_loss = self.cross_entropy(logits, target, label, batch, clean_loss)
        pretrained = self.attached(self.pretrained)(input).to(features.dtype)
        self.bank.add(batch, label, pretrained=pretrained, tuned=features)
        bank_label = self.bank.label
        # not in no_grad(): autocast would keep the weights that it casts there for later calls, without their gradient
        scores = classify(classifier, self.bank.tuned.to(features.dtype)).detach()
        shifted = self.shift(scores).to(features.dtype)
        log_p = at_least_float32(classify(classifier, shifted)).log_softmax(dim=1)
        filled = bank_label >= 0
        total = self.nll(log_p, bank_label).masked_fill(~filled, 0.0).sum()
        bank_loss = total / filled.sum().clamp(min=1)
        num_labelled = (label >= 0).sum().clamp(min=1)
        weighted = total / num_labelled if self.weight is None else self.weight * bank_loss
        return {'loss': task_loss + weighted, 'task_loss': task_loss, 'bank_loss': bank_loss}

    @torch.no_grad()
    def shift(self, scores: torch.Tensor) -> torch.Tensor:
        """Features of the pretrained model, each class moved to where the tuned model has it.

        Args:
            scores: Logits of the tuned features of the bank (K + 1, C).

        Returns:
            One row for each of the bank (K + 1, D) in float32 or float64, meaningless where the bank is empty.
        """
        label = self.bank.label
        num_classes = scores.shape[1]
        member = (label[:, None] == torch.arange(num_classes, device=label.device)).T
        with torch.autocast(device_type=label.device.type, enabled=False):
            pretrained, tuned = at_least_float32(self.bank.pretrained), at_least_float32(self.bank.tuned)
            scores = at_least_float32(scores)
            lowest = torch.finfo(scores.dtype).min
            # a softmax over the rows of a class; those of others get exactly 0, also in a class without rows
            share = scores.T.masked_fill(~member, lowest).softmax(dim=1).masked_fill(~member, 0.0)
            count = member.sum(dim=1, keepdim=True).clamp(min=1)
            mean = member.to(pretrained.dtype) / count
            by_class = share.to(tuned.dtype) @ tuned - mean @ pretrained
            return pretrained + by_class.index_select(0, label.clamp(min=0))
