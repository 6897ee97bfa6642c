from .load import CheckpointReport as CheckpointReport
from .load import load_checkpoint as load_checkpoint
from .rules import KEY_RULES as KEY_RULES
from .rules import KeyRule as KeyRule
