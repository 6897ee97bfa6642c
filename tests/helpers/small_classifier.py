"""A classifier of two parts with the methods of one of timm"""

import torch.nn as nn


class SmallClassifier(nn.Module):
    """What a task needs of a timm classifier."""

    def __init__(self, stem, head, num_classes):
        super().__init__()
        self.num_classes, self.num_features = num_classes, stem.out_features
        self.stem, self.head = stem, head

    def get_classifier(self):
        return self.head

    def forward_features(self, x):
        return self.stem(x).tanh()

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))
