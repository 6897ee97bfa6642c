"""The head trained alone for the first epochs, then everything: linear probing, then tuning

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
    """Parameters of the classifier, and all that the task trains beside the model, as the projection head."""
    model = _plain_model(task)
    classifier = {id(p) for p in classifier_parameters(model)}
    backbone = {id(p) for p in model.parameters()} - classifier
    return [p for p in unwrap_model(task.get_trainable_module()).parameters() if id(p) not in backbone]


class BackboneFreezer:
    """Keeps all but the head from training in the first epochs.

    What did not require gradients before is left alone. Nothing is taken from the optimizer, which passes over
    parameters without gradient.

    Args:
        task: What is trained; the optimizer must have been created.
        num_epochs: Epochs in which only the head trains.
    """

    def __init__(self, task: TrainingTask, num_epochs: int):
        self.task = task
        self.num_epochs = num_epochs
        self.frozen = False
        head = {id(p) for p in head_parameters(task)}
        parameters = unwrap_model(task.get_trainable_module()).parameters()
        self.backbone = [p for p in parameters if p.requires_grad and id(p) not in head]

    def start_epoch(self, epoch: int) -> bool:
        """Freeze or unfreeze for an epoch. Whether that changed anything, so that wrappers must be made anew."""
        frozen = epoch < self.num_epochs
        changed = frozen != self.frozen
        for p in self.backbone:
            p.requires_grad_(not frozen)
        self.frozen = frozen
        return changed

    def after_train_mode(self) -> None:
        """Put a frozen backbone into evaluation mode: no dropout, and no update of statistics in any normalization."""
        if not self.frozen:
            return
        model = _plain_model(self.task)
        model.eval()
        for classifier in get_classifiers(model):
            classifier.train()
        model.training = True  # itself only: tasks and heads take the mode from it
