"""Semantic segmentation: a timm backbone with a head, Core-tuned on pixels in place of images"""

from typing import TYPE_CHECKING

from ..evaluation.segmentation import SegmentationEvaluator as SegmentationEvaluator
from ..lazy import lazy_names

if TYPE_CHECKING:
    from .export import export_segmentation_model as export_segmentation_model
    from .export import load_segmentation_model as load_segmentation_model
    from .model import SegmentationModel as SegmentationModel
    from .model import create_segmentation_model as create_segmentation_model
    from .predict import predict_image as predict_image
    from .task import SegmentationTask as SegmentationTask

# the command line of train.py asks for the names of heads only
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        'export': ('export_segmentation_model', 'load_segmentation_model'),
        'model': ('SegmentationModel', 'create_segmentation_model'),
        'predict': ('predict_image',),
        'task': ('SegmentationTask',),
    },
)
