from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .__main__ import main as main
    from .loop import Trainer as Trainer
    from .loop_config import LoopConfig as LoopConfig
    from .notebook import fine_tune as fine_tune

# the command line is parsed before accelerate and all that trains are imported
__getattr__, __dir__ = lazy_names(
    __name__, {'__main__': ('main',), 'loop': ('Trainer',), 'loop_config': ('LoopConfig',), 'notebook': ('fine_tune',)}
)
