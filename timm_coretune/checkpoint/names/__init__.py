"""How each library names the tensors of its networks, as tables that lead to the names of timm"""

from typing import Tuple

from .efficientnet import RENAMES as EFFICIENTNET
from .others import RENAMES as OTHERS
from .rename import Rename
from .torchvision import RENAMES as TORCHVISION
from .transformers import RENAMES as TRANSFORMERS

RENAMES: Tuple[Rename, ...] = (*OTHERS, *EFFICIENTNET, *TORCHVISION, *TRANSFORMERS)
