"""Losses on features and logits, with one file per paper"""

from typing import Dict, Type

from .base import TaskLoss as TaskLoss
from .core_tuning import CoreTuningLoss as CoreTuningLoss
from .focal_supcon import FocalSupConLoss as FocalSupConLoss
from .projection import ProjectionHead as ProjectionHead

LOSSES: Dict[str, Type[TaskLoss]] = {'coretune': CoreTuningLoss}  # by name in timm's loss factory
