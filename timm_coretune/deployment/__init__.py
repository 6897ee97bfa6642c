from .files import Exported as Exported
from .files import deploy as deploy
