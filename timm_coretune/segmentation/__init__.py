"""Semantic segmentation: any timm backbone with a head of torchvision, and Core-tuning of its pixels"""

from .model import SegmentationModel as SegmentationModel
from .model import create_segmentation_model as create_segmentation_model
from .task import SegmentationTask as SegmentationTask
