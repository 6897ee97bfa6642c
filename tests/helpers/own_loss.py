"""A loss that is not of the package: cross-entropy, and the distance of features to a moving mean of their class"""

import torch
import torch.nn.functional as F

from timm_coretune.loss import TaskLoss


class MovingMeanLoss(TaskLoss):
    def __init__(self, num_features, num_classes, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer('means', torch.zeros(num_classes, num_features))
        self.register_buffer('fresh', torch.zeros(num_classes, num_features))

    def compute(self, features, logits, target, batch, clean_loss=None):
        all_target = batch.gather(target)
        one_hot = F.one_hot(all_target, len(self.means)).to(features.dtype)
        self.fresh.copy_(one_hot.T @ batch.gather(features.detach()) / one_hot.sum(0).clamp(min=1)[:, None])
        task_loss = batch.mean(F.cross_entropy(logits, target, reduction='sum'), all_target)
        pull_loss = batch.mean((features - self.means[target]).square().mean(dim=1).sum(), all_target)
        return {'loss': task_loss + 0.1 * pull_loss, 'task_loss': task_loss, 'pull_loss': pull_loss}

    def after_update(self, model):
        self.means.lerp_(self.fresh, 0.1)
