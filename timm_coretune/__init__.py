from typing import TYPE_CHECKING

from .cached_step import CachedStep as CachedStep
from .lazy import lazy_names
from .loss.core_tuning import CoreTuningLoss as CoreTuningLoss
from .loss.focal_supcon import FocalSupConLoss as FocalSupConLoss
from .mining import mine_hard_pairs as mine_hard_pairs
from .mixup import HardPairMixup as HardPairMixup
from .register import register
from .task import CoreTuningTask as CoreTuningTask
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .averaging import average_weights as average_weights
    from .checkpoint import convert_checkpoint as convert_checkpoint
    from .checkpoint import inspect_checkpoint as inspect_checkpoint
    from .checkpoint import load_checkpoint as load_checkpoint
    from .hub import export_model as export_model
    from .hub import push_to_hub as push_to_hub
    from .segmentation import SegmentationTask as SegmentationTask
    from .segmentation import create_segmentation_model as create_segmentation_model
    from .segmentation import load_segmentation_model as load_segmentation_model

# half of the modules of this package; what is registered with timm needs none of them
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        'averaging': ('average_weights',),
        'checkpoint': ('convert_checkpoint', 'inspect_checkpoint', 'load_checkpoint'),
        'hub': ('export_model', 'push_to_hub'),
        'integrations': (),
        'segmentation': ('SegmentationTask', 'create_segmentation_model', 'load_segmentation_model'),
    },
)

register()
