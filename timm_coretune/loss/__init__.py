"""Losses on features and logits"""

from .core_tuning import CoreTuningLoss as CoreTuningLoss
from .focal_supcon import FocalSupConLoss as FocalSupConLoss
from .projection import ProjectionHead as ProjectionHead
