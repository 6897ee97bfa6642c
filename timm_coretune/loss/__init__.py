"""Losses on features and logits, with one file per paper"""

from typing import Any, Dict, Optional, Type, Union

import torch.nn as nn

from .base import TaskLoss as TaskLoss
from .base import arguments_of
from .bcl import BCLLoss as BCLLoss
from .bi_tuning import BiTuningLoss as BiTuningLoss
from .coin import COINLoss as COINLoss
from .core_tuning import CoreTuningLoss as CoreTuningLoss
from .dr_tune import DRTuneLoss as DRTuneLoss
from .focal_supcon import FocalSupConLoss as FocalSupConLoss
from .l2_sp import L2SPLoss as L2SPLoss
from .ldifs import LDIFSLoss as LDIFSLoss
from .parts.contrastive import ContrastiveLoss as ContrastiveLoss
from .parts.projection import ProjectionHead as ProjectionHead
from .scl import SCLLoss as SCLLoss
from .spd import SPDLoss as SPDLoss

METHODS: Dict[str, Type[TaskLoss]] = {
    'core': CoreTuningLoss,
    'scl': SCLLoss,
    'bcl': BCLLoss,
    'coin': COINLoss,
    'l2-sp': L2SPLoss,
    'spd': SPDLoss,
    'bi-tuning': BiTuningLoss,
    'dr-tune': DRTuneLoss,
    'ldifs': LDIFSLoss,
}  # by the names of train.py --method, where plain is cross-entropy without a loss of this package
# by their names in timm's loss factory
LOSSES: Dict[str, Type[TaskLoss]] = {'coretune': CoreTuningLoss, **{k: v for k, v in METHODS.items() if k != 'core'}}
# arguments that are no choice of a method
_OF_ALL = frozenset({'num_features', 'generator', 'uneven_batches', 'class_weight'})


def resolve_method(coretune: bool, method: Optional[str]) -> Optional[str]:
    """Name in METHODS of what --coretune and --method ask for, None for cross-entropy."""
    name = 'core' if coretune else method
    return None if name == 'plain' else name


def create_method(name: str, num_features: Union[int, nn.Module], **kwargs: Any) -> TaskLoss:
    """Create the loss of a method.

    Args:
        name: Name of the method in METHODS.
        num_features: Width D of the pre-logits features, or the model.
        **kwargs: Arguments of the loss.

    Raises:
        ValueError: There is no such method, or it has no such argument.
    """
    if name not in METHODS:
        raise ValueError(f'Expected a method of {", ".join(METHODS)}, got {name!r}.')
    known = arguments_of(METHODS[name])
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(
            f'Method {name!r} has no argument {", ".join(unknown)}. It takes {", ".join(sorted(known - _OF_ALL))}.'
        )
    create: Any = METHODS[name]
    return create(num_features, **kwargs)
