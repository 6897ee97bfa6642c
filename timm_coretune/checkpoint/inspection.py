"""What a checkpoint holds, and its backbone as a file that plain timm loads"""

import dataclasses
import os
from typing import Optional, Tuple, Union

import torch
import torch.nn as nn
from safetensors.torch import save_file

from .architectures import build_on_meta, candidates, fitting_models
from .load import open_checkpoint, read_npz
from .plan import Plan, make_plan
from .read import Checkpoint
from .report import CheckpointReport
from .target import create_target


def inspect_checkpoint(
    source: Union[str, os.PathLike], model: Optional[nn.Module] = None, checkpoint_key: Optional[str] = None
) -> CheckpointReport:
    """Tell what a checkpoint holds, loading nothing.

    Args:
        source: As for `load_checkpoint`.
        model: Model to read it for, left out to look for one among timm's.
        checkpoint_key: As for `load_checkpoint`.

    Raises:
        ValueError: It cannot be read, or fits no model.
    """
    return _plan(open_checkpoint(source), model, checkpoint_key)[0].report


def convert_checkpoint(
    source: Union[str, os.PathLike],
    destination: Union[str, os.PathLike],
    model: Optional[nn.Module] = None,
    checkpoint_key: Optional[str] = None,
) -> CheckpointReport:
    """Write the backbone of a checkpoint as safetensors with timm's names.

    `timm.create_model(name, num_classes=0, checkpoint_path=destination)` loads it, with the name and arguments that
    the report gives as architecture.

    Args:
        source: As for `load_checkpoint`.
        destination: File to write, ending in .safetensors.
        model: Model to read it for, left out to look for one among timm's.
        checkpoint_key: As for `load_checkpoint`.

    Raises:
        ValueError: It cannot be read, fits no model, or the destination has another ending.
    """
    destination = os.fspath(destination)
    if not destination.endswith('.safetensors'):
        raise ValueError(f'Expected a destination that ends in .safetensors, got {destination!r}: timm goes by it.')
    checkpoint = open_checkpoint(source)
    plan, model = _plan(checkpoint, model, checkpoint_key)
    target = create_target(model)
    tensors = {}
    for batch in checkpoint.batches(plan.tensors):
        tensors.update({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in batch.items()})
    for name, shape in target.shapes.items():
        if name.endswith('num_batches_tracked'):  # timm's loading is strict, and a file may lack these
            tensors.setdefault(name, torch.zeros(shape, dtype=torch.long))
    report = plan.report
    metadata = {'format': 'pt', 'method': report.method, 'copy': report.copy, 'architecture': report.architecture}
    # so that loading it again brings them along
    metadata.update({key: ' '.join(map(str, value)) for key, value in report.data_config.items()})
    save_file(tensors, destination + '.part', metadata)
    os.replace(destination + '.part', destination)
    return report


def _plan(checkpoint: Checkpoint, model: Optional[nn.Module], checkpoint_key: Optional[str]) -> Tuple[Plan, nn.Module]:
    """The reading for a model, or for the first of timm's that fits."""
    if model is None:
        if checkpoint.kind == 'npz':
            raise ValueError(f'Expected a model to read the JAX archive {checkpoint.source!r} for: give one (--model).')
        found = fitting_models(checkpoint, 1, checkpoint_key)
        if not found:
            tried = '; '.join(candidates(checkpoint)) or 'its keys look like no known family'
            raise ValueError(
                f'Expected a network that timm has in {checkpoint.source!r}, none of those tried fits ({tried}). '
                'Give the model (--model NAME --model-kwargs KEY=VALUE ...) to see what is missing.'
            )
        architecture, model = found[0], build_on_meta(found[0])
    else:
        architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', type(model).__name__)
        if checkpoint.kind == 'npz':
            checkpoint = read_npz(model, checkpoint)
    plan = make_plan(create_target(model), checkpoint, checkpoint_key=checkpoint_key)
    return plan._replace(report=dataclasses.replace(plan.report, architecture=architecture)), model
