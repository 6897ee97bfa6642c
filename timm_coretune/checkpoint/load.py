"""A self-supervised checkpoint into a timm model: read, map, check that nothing is lost, and only then load"""

import logging
import os
import pickle
from typing import Dict, NamedTuple, Tuple

import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import load_state_dict

from ..classifier import classifier_parameters
from .rules import KEY_RULES, KeyRule

_logger = logging.getLogger(__name__)


class CheckpointReport(NamedTuple):
    """What was loaded.

    Attributes:
        rule: How the file's keys were read.
        loaded: Tensors of the model that got their value from the file.
        classifier: Whether the classifier is among them.
    """

    rule: KeyRule
    loaded: Tuple[str, ...]
    classifier: bool


def read_state_dict(source: str) -> Dict[str, torch.Tensor]:
    """Read the tensors of a safetensors or PyTorch file, never unpickling anything else.

    Raises:
        ValueError: There is no such file, or it is no checkpoint.
    """
    if not os.path.isfile(source):
        raise ValueError(f'Expected a checkpoint file, found none at {source!r}. Check the path.')
    try:
        state_dict = load_state_dict(source, weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError, SafetensorError) as e:
        raise ValueError(
            f'Expected a checkpoint in safetensors or PyTorch format, could not read {source!r}: {e}'
        ) from e
    tensors = {k: v for k, v in state_dict.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f'Expected tensors by name in {source!r}, found only {sorted(map(str, state_dict))[:5]}.')
    return tensors


def classifier_keys(model: nn.Module) -> Tuple[str, ...]:
    """Names of the parameters that classify, those of `get_classifier()`."""
    owned = {id(p) for p in classifier_parameters(model)}
    return tuple(name for name, p in model.named_parameters() if id(p) in owned)


def _few(keys) -> str:
    keys = sorted(keys)
    return f'{", ".join(keys[:5])}{f" and {len(keys) - 5} more" if len(keys) > 5 else ""}'


def load_checkpoint(model: nn.Module, source: str, load_classifier: bool = False) -> CheckpointReport:
    """Load the backbone of a self-supervised checkpoint into a timm model.

    The model is touched only after every tensor of its backbone was found in the file with its shape. Projection heads,
    queues and momentum encoders of the file are left out.

    Args:
        model: A timm model, as created for the new labels.
        source: A safetensors or PyTorch file.
        load_classifier: Load the classifier too, where the file has one that fits. Otherwise it stays as initialised.

    Returns:
        What was loaded.

    Raises:
        ValueError: The file cannot be read, or lacks a part of the backbone, or holds one the model has not.
    """
    tensors = read_state_dict(source)
    rule = next(rule for rule in KEY_RULES if any(key.startswith(rule.prefix) for key in tensors))
    stripped = {key[len(rule.prefix) :]: value for key, value in tensors.items() if key.startswith(rule.prefix)}

    target = model.state_dict()
    classifier = classifier_keys(model)
    mapped = {k: v for k, v in stripped.items() if k in target and v.shape == target[k].shape}
    has_classifier = load_classifier and bool(classifier) and all(k in mapped for k in classifier)
    if not has_classifier:
        mapped = {k: v for k, v in mapped.items() if k not in classifier}
    # torch fills in num_batches_tracked, and files converted from elsewhere lack it
    expected = {k for k in target if k not in classifier and not k.endswith('num_batches_tracked')}
    missing = expected - mapped.keys()
    left_over = {k for k in stripped if k not in target and not k.startswith(rule.heads)}
    wrong_shape = {f'{k} {tuple(stripped[k].shape)} for {tuple(target[k].shape)}' for k in missing if k in stripped}
    if missing or left_over:
        raise ValueError(
            f'Expected all {len(expected)} backbone tensors of {type(model).__name__} in {source!r}, read as '
            f'{rule.method}: {len(missing)} are missing ({_few(missing) or "none"}), of these {len(wrong_shape)} have '
            f'another shape ({_few(wrong_shape) or "none"}); {len(left_over)} of the file have no place in the model '
            f'({_few(left_over) or "none"}). The model must be the architecture that was pretrained.'
        )
    model.load_state_dict(mapped, strict=False)
    _logger.info(
        f'Loaded {source}: {rule.method}, {len(expected)} of {len(expected)} backbone tensors, '
        f'classifier {"loaded" if has_classifier else "new"}.'
    )
    return CheckpointReport(rule, tuple(sorted(mapped)), has_classifier)
