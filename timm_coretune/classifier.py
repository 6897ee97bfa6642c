"""Which modules of a timm model classify"""

from typing import List

import torch.nn as nn


def get_classifiers(model: nn.Module) -> List[nn.Module]:
    """The modules that `get_classifier()` names, a list also where it names one, as most models do, or none."""
    if not getattr(model, 'num_classes', 0):
        return []
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, (tuple, list, nn.ModuleList)) else [classifiers]
    return [classifier for classifier in classifiers if isinstance(classifier, nn.Module)]


def classifier_parameters(model: nn.Module) -> List[nn.Parameter]:
    """Their parameters."""
    return [p for classifier in get_classifiers(model) for p in classifier.parameters()]
