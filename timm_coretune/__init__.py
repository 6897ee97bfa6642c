from .cached_step import CachedStep as CachedStep
from .checkpoint import convert_checkpoint as convert_checkpoint
from .checkpoint import inspect_checkpoint as inspect_checkpoint
from .checkpoint import load_checkpoint as load_checkpoint
from .hub import export_model as export_model
from .hub import push_to_hub as push_to_hub
from .loss.core_tuning import CoreTuningLoss as CoreTuningLoss
from .loss.focal_supcon import FocalSupConLoss as FocalSupConLoss
from .mining import mine_hard_pairs as mine_hard_pairs
from .mixup import HardPairMixup as HardPairMixup
from .register import register
from .segmentation import SegmentationTask as SegmentationTask
from .segmentation import create_segmentation_model as create_segmentation_model
from .segmentation import load_segmentation_model as load_segmentation_model
from .task import CoreTuningTask as CoreTuningTask
from .version import __version__ as __version__

register()
