"""The bars that show how far an epoch is"""

import sys

from accelerate import Accelerator
from tqdm import tqdm

from ..loop_config import LoopConfig


def progress_bar(accelerator: Accelerator, config: LoopConfig, total: int, description: str, initial: int = 0) -> tqdm:
    """A bar, which shows only in the main process, and on a terminal or in a notebook."""
    is_seen = sys.stderr.isatty() or 'ipykernel' in sys.modules
    hidden = not (accelerator.is_main_process and is_seen and config.progress)
    return tqdm(total=total, initial=initial, desc=description, disable=hidden, leave=False, dynamic_ncols=True)
