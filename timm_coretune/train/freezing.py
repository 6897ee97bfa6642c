"""Trains only the head in the first epochs, then everything: linear probing, then fine-tuning

Paper: `Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution`
    - Ananya Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054
"""

from typing import List

import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..timm_model import classifier_parameters, get_classifiers


def _plain_model(task: TrainingTask) -> nn.Module:
    module = unwrap_model(task.get_trainable_module())
    return getattr(module, 'model', module)


def head_parameters(task: TrainingTask) -> List[nn.Parameter]:
    """Parameters of the classifier, and of all that is trained besides the model, such as the projection head."""
    model = _plain_model(task)
    classifier = {id(p) for p in classifier_parameters(model)}
    backbone = {id(p) for p in model.parameters()} - classifier
    return [p for p in unwrap_model(task.get_trainable_module()).parameters() if id(p) not in backbone]


class BackboneFreezer:
    """Keeps the backbone from training in the first epochs.

    Parameters that did not require gradients before are left alone. Frozen parameters stay in the optimizer, which
    skips parameters without gradient.

    Args:
        task: Task that is trained. Its optimizer must already exist.
        num_epochs: Number of first epochs in which only the head trains.
    """

    def __init__(self, task: TrainingTask, num_epochs: int):
        self.task = task
        self.num_epochs = num_epochs
        self.frozen = False
        head = {id(p) for p in head_parameters(task)}
        parameters = unwrap_model(task.get_trainable_module()).parameters()
        self.backbone = [p for p in parameters if p.requires_grad and id(p) not in head]

    def start_epoch(self, epoch: int) -> bool:
        """Freeze or unfreeze the backbone. Returns whether that changed anything, so that DDP must be rebuilt."""
        frozen = epoch < self.num_epochs
        changed = frozen != self.frozen
        for p in self.backbone:
            p.requires_grad_(not frozen)
        self.frozen = frozen
        return changed

    def after_train_mode(self) -> None:
        """Put a frozen backbone into evaluation mode: no dropout, and no update of normalization statistics."""
        if not self.frozen:
            return
        model = _plain_model(self.task)
        model.eval()
        for classifier in get_classifiers(model):
            classifier.train()
        model.training = True  # sets the flag of the model alone, which tasks and heads read
