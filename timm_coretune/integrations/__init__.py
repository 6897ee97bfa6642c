"""Core-tuning in the training loops of other libraries, which are imported when a name is first used"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .huggingface import CoreTuningTrainer as CoreTuningTrainer
    from .lightning import CoreTuningModule as CoreTuningModule

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        'huggingface': ('CoreTuningTrainer',),
        'lightning': ('CoreTuningModule',),
    },
)
