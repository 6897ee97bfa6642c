from .loop import LoopConfig as LoopConfig
from .loop import Trainer as Trainer
from .main import main as main
from .notebook import fine_tune as fine_tune
