"""Semantic segmentation: a timm backbone with a head of torchvision, Core-tuned on pixels in place of images"""

from ..evaluation.segmentation import SegmentationEvaluator as SegmentationEvaluator
from .export import export_segmentation_model as export_segmentation_model
from .export import load_segmentation_model as load_segmentation_model
from .model import SegmentationModel as SegmentationModel
from .model import create_segmentation_model as create_segmentation_model
from .predict import predict_image as predict_image
from .task import SegmentationTask as SegmentationTask
