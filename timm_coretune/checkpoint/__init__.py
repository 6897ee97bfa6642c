from .load import convert_checkpoint as convert_checkpoint
from .load import inspect_checkpoint as inspect_checkpoint
from .load import load_checkpoint as load_checkpoint
from .report import CheckpointReport as CheckpointReport
