"""The weights that a run started from"""

import dataclasses
import logging
import os
from typing import Any, Dict, NamedTuple, Optional, Set, cast

import torch
import torch.nn as nn

from ..checks import shorten
from ..run_folder import describe_weights, find_weights
from ..timm_model import get_classifiers
from ..train.cli.settings import ModelSettings, Settings
from ..train.model import load_backbone, load_initial_checkpoint
from ..train.session import kind_of

_logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """The weights that a run started from.

    Attributes:
        state: Its tensors by name, without those of a new head, which have no value before the training.
        name: What it is, in words.
        new: Names of the tensors of the model that are not in `state`.
    """

    state: Dict[str, torch.Tensor]
    name: str
    new: Set[str]


def _head_of(model: nn.Module) -> Set[str]:
    """Names of the tensors of the classifier. A segmentation model has its decoder there too."""
    parts = get_classifiers(model)
    names = [name for name, module in model.named_modules() if any(module is part for part in parts)]
    return {key for key in model.state_dict() if any(key.startswith(f'{name}.') for name in names)}


def _fill(settings: ModelSettings, model: Any) -> Set[str]:
    """Load the files of the settings into a model, and return the names of the tensors that are in none of them."""
    state = model.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.fill_(float('nan'))
    load_backbone(settings, getattr(model, 'backbone', model))
    load_initial_checkpoint(settings, model)
    return {name for name, tensor in state.items() if tensor.is_floating_point() and bool(tensor.isnan().any())}


def load_start(settings: Settings, num_classes: int, source: Optional[str] = None) -> Start:
    """Load the weights that a run started from, by the code that loads them for the training.

    Args:
        settings: Settings of the run.
        num_classes: Number of classes.
        source: Weights to take in place of those of the run: a file, or the folder of a run or an export.

    Raises:
        ValueError: The run started from random weights, or its checkpoint cannot be loaded any more.
    """
    chosen = settings.model
    described = describe_weights(source) if source is not None and os.path.isdir(source) else None
    if described is not None:
        source = find_weights(str(source), described) or source
    if source is not None:
        chosen = dataclasses.replace(
            chosen, pretrained=False, pretrained_path=None, initial_checkpoint=source, checkpoint_key=None
        )
    path = chosen.initial_checkpoint or chosen.pretrained_path
    if not path and not chosen.pretrained:
        raise ValueError(
            'Expected a run that started from pretrained weights, this one started from random weights, between which '
            'and the tuned ones there is nothing to gain. Name other weights of the same model as --start FILE.'
        )
    plain = dataclasses.replace(chosen, pretrained=bool(chosen.pretrained and not path))
    plain = dataclasses.replace(plain, pretrained_path=None, initial_checkpoint='')
    model, _ = kind_of(settings).create_model(dataclasses.replace(settings, model=plain), num_classes, False)
    if path:
        new = _fill(chosen, model)
        name = f'the checkpoint {os.path.basename(os.path.normpath(path))}'
    else:
        told = cast(Dict[str, Any], model.pretrained_cfg)
        has_head = told.get('num_classes') == num_classes and not settings.data.segmentation
        new = set() if has_head else _head_of(model)
        name = f"timm's weights {told.get('architecture')}.{told.get('tag')}".rstrip('.')
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in new}
    without = _head_of(model) & new
    _logger.info(
        f'Start: {name}. '
        + (
            f'It has no head for these classes: the tuned head is kept for every alpha ({shorten(sorted(without))}).'
            if without
            else 'Its head is for these classes, and is interpolated too.'
        )
    )
    if new - without:
        _logger.info(f'Tensors that the start lacks are kept as tuned too: {shorten(sorted(new - without))}.')
    return Start(state, name, new)
