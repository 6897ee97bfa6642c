"""Where self-supervised methods keep the backbone in their files

A new format is a new row. Prefixes are those left after timm's `load_state_dict` took the dictionary out of its
container and stripped `module.`.
"""

from typing import NamedTuple, Tuple


class KeyRule(NamedTuple):
    """How one kind of file names its tensors.

    Attributes:
        method: Who writes such files, for the log and for errors.
        prefix: What the keys of the backbone start with; '' fits any file, so its coverage decides.
        heads: What follows the prefix in keys of heads that are dropped with the pretraining.
    """

    method: str
    prefix: str
    heads: Tuple[str, ...]


KEY_RULES = (  # first match wins, the most specific come first
    # facebookresearch/moco main_lincls.py: the query encoder is evaluated; v2 has an MLP in place of fc
    KeyRule('MoCo v1/v2', 'encoder_q.', ('fc.',)),
    # facebookresearch/moco-v3 main_lincls.py: the base encoder is evaluated
    KeyRule('MoCo v3', 'base_encoder.', ('fc.', 'head.')),
    # facebookresearch/simsiam main_lincls.py; SupContrast main_linear.py
    KeyRule('SimSiam, SupContrast', 'encoder.', ('fc.', 'head.')),
    # solo-learn main_linear.py, mmpretrain, sthalles/SimCLR
    KeyRule('solo-learn, mmpretrain, SimCLR', 'backbone.', ('fc.', 'head.')),
    # SwAV as released, Barlow Twins, VICReg, timm itself
    KeyRule('plain backbone', '', ('fc.', 'head.', 'classifier.', 'projection_head.', 'prototypes.')),
)
