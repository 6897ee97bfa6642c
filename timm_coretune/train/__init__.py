from .loop import Trainer as Trainer
from .main import main as main
