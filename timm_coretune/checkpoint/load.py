"""A checkpoint into a timm model: read, map, check that nothing is lost, and only then load"""

import copy
import dataclasses
import logging
import os
from typing import Optional, Union

import torch
import torch.nn as nn

from .plan import make_plan
from .pretraining import write_data_config
from .read import Checkpoint, read_files
from .releases import RELEASES
from .report import CheckpointReport
from .source import resolve_source
from .target import create_target

_logger = logging.getLogger(__name__)


def open_checkpoint(source: Union[str, os.PathLike]) -> Checkpoint:
    """Find and read what a user named, mapped into memory.

    Raises:
        ValueError: There is no checkpoint, or it cannot be read without trusting it.
    """
    source = os.fspath(source)
    files = resolve_source(source)
    config = {**files.config, 'release': source} if source in RELEASES else files.config
    return read_files(source, files.paths, config)


def load_checkpoint(
    model: nn.Module,
    source: Union[str, os.PathLike],
    load_classifier: bool = False,
    checkpoint_key: Optional[str] = None,
    allow_partial: bool = False,
) -> CheckpointReport:
    """Load the backbone of any self-supervised checkpoint into a timm model.

    The model is touched only after every tensor of its backbone was found in the file, with its shape and finite.
    Projection heads, queues and other copies of the encoder are left out. Where the normalization of the pretraining
    images is known, it is written to `model.pretrained_cfg`, where `timm.data.resolve_model_data_config` finds it.

    Args:
        model: A timm model, as created for the new labels.
        source: A file or folder, `hf-hub:owner/name[@revision]`, an `https://` URL, or a short name like
            `mocov2_resnet50`.
        load_classifier: Load the classifier too, where the file has one that fits. Otherwise it stays as initialised.
        checkpoint_key: Which copy to take, where the file has more than one and not the default: a key of the file
            (`student`), a prefix (`encoder_k`), or both (`state_dict/encoder_k`).
        allow_partial: Load what fits, if that is more than half, where the file lacks a part of the backbone or has
            one more, with a warning.

    Returns:
        What was loaded.

    Raises:
        ValueError: The file cannot be read, lacks a part of the backbone, or holds one that the model has not.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.kind == 'npz':
        checkpoint = read_npz(model, checkpoint)
    target = create_target(model)
    plan = make_plan(target, checkpoint, load_classifier, checkpoint_key, allow_partial)
    state = model.state_dict()
    with torch.no_grad():
        for batch in checkpoint.batches(plan.tensors):
            for name, tensor in batch.items():
                state[name].copy_(tensor)
    report = dataclasses.replace(
        plan.report, notes=(*plan.report.notes, *write_data_config(model, plan.report.data_config))
    )
    _logger.info(f'Loaded {report.line()}.')
    for note in report.notes:
        _logger.warning(f'{report.source}: {note}.')
    return report


def read_npz(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Let timm read a JAX archive into a copy of the model, and take what it filled there.

    Such readers fill a model and report nothing, so the copy holds NaN before.
    """
    if not hasattr(model, 'load_pretrained'):
        raise ValueError(
            f'Expected a model for which timm reads JAX archives, {checkpoint.source!r} is one and '
            f'{type(model).__name__} has no reader. Take the PyTorch or safetensors file of the same weights.'
        )
    scratch = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scratch.parameters():
            parameter.fill_(float('nan'))
    try:
        scratch.load_pretrained(checkpoint.files[0])
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise ValueError(f'Expected a JAX archive of a {type(model).__name__} in {checkpoint.source!r}: {e}') from e
    filled = {name: t for name, t in scratch.state_dict().items() if not t.is_floating_point() or not t.isnan().all()}
    return checkpoint._replace(tree=filled)
