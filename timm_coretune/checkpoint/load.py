"""Load, inspect or convert a self-supervised checkpoint

All three find the files, read them, map their tensors onto a timm model, and check that no part of the backbone is
missing. Only then is the model changed or a file written.
"""

import copy
import dataclasses
import logging
import os
from typing import Dict, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import save_file

from ..atomic import write_whole
from ..checks import clip
from ..model_config import Description
from ..redaction import split_url
from ..run_folder import CONFIG_NAME
from ..timm_model import create_target
from .advice.fit import fitting_architectures
from .architectures import Architecture, architecture_of, build_on_meta, candidates
from .plan import Plan, make_plan
from .pretraining import average_frames, write_data_config
from .read import Checkpoint, read_files
from .reading.configs import describe
from .report import CheckpointReport, count_objects, few
from .source import RELEASES, resolve_source

_logger = logging.getLogger(__name__)


def load_checkpoint(
    model: nn.Module,
    source: Union[str, os.PathLike],
    load_classifier: bool = False,
    checkpoint_key: Optional[str] = None,
    allow_partial: bool = False,
    allow_differences: bool = False,
    frames: Optional[int] = None,
) -> CheckpointReport:
    """Load the backbone of any self-supervised checkpoint into a timm model.

    The model is changed only after every tensor of its backbone was found in the file, in the right shape and with
    finite values. Projection heads, queues and other copies of the encoder are left out. If the normalization of the
    pretraining images is known, it is written to `model.pretrained_cfg`, where
    `timm.data.resolve_model_data_config` finds it. With `load_classifier` the same holds for the whole preparation of
    images, if a config.json of the same timm model is beside the weights.

    Args:
        model: A timm model, created for the new labels.
        source: A file or folder, `hf-hub:owner/name[/file][@revision]`, an `https://` URL, or a short name like
            `mocov2_resnet50`.
        load_classifier: Load the classifier too, if the file has one that fits. Otherwise the classifier of the model
            stays as it is.
        checkpoint_key: Which copy of the encoder to take from a file that holds several: a key of the file
            (`student`), a prefix (`encoder_k`), or both (`state_dict/encoder_k`). None takes the copy that the authors
            of the method evaluate.
        allow_partial: Accept a file that lacks a part of the backbone, or has a part that the model lacks. If it fills
            more than half of the backbone, what fits is loaded with a warning. It allows differences too.
        allow_differences: Accept a model that differs from the config beside the checkpoint, such as in
            `layer_norm_eps`, with a warning.
        frames: Number of frames that a network of video was trained with. They are averaged to one picture: the patch
            projection is summed over time, position embeddings are averaged. None refuses such a network.

    Returns:
        Report of what was loaded.

    Raises:
        ValueError: The file cannot be read, lacks a part of the backbone, or has a part that the model lacks.
    """
    checkpoint = open_checkpoint(source, described=load_classifier)
    description = _describe(checkpoint, model) if load_classifier else None
    if checkpoint.kind == 'npz':
        checkpoint = read_npz(model, checkpoint)
    if frames is not None:
        checkpoint = checkpoint._replace(tree=average_frames(checkpoint.tree, frames))
    target = create_target(model)
    plan = make_plan(target, checkpoint, load_classifier, checkpoint_key, allow_partial, allow_differences)
    _check_shapes(target.state, plan.tensors, checkpoint.source)
    with torch.no_grad():
        for batch in checkpoint.batches(plan.tensors):
            for name, tensor in batch.items():
                _fill(target.state[name], tensor)
    report = plan.report
    if description is not None:
        data_config = {**report.data_config, **description.data_config}
        report = dataclasses.replace(report, data_config=data_config, described_by=description.path)
    notes = write_data_config(model, report.data_config, description is not None, report.resized)
    report = dataclasses.replace(report, notes=(*report.notes, *notes))
    _logger.info(f'Loaded {report.line()}.')
    if report.left_out:
        _logger.info(f'Not read from {report.source}, as they are no tensors: {count_objects(report.left_out)}.')
    for note in report.notes:
        _logger.warning(f'{report.source}: {note}.')
    return report


def inspect_checkpoint(
    source: Union[str, os.PathLike], model: Optional[nn.Module] = None, checkpoint_key: Optional[str] = None
) -> CheckpointReport:
    """Report what a checkpoint holds, without loading it into a model.

    Args:
        source: As for `load_checkpoint`.
        model: Model to read the checkpoint for. None looks for a timm model that fits.
        checkpoint_key: As for `load_checkpoint`.

    Raises:
        ValueError: The checkpoint cannot be read, or fits no model.
    """
    return _plan(open_checkpoint(source), model, checkpoint_key, allow_differences=True)[0].report


def convert_checkpoint(
    source: Union[str, os.PathLike],
    destination: Union[str, os.PathLike],
    model: Optional[nn.Module] = None,
    checkpoint_key: Optional[str] = None,
    allow_differences: bool = False,
) -> CheckpointReport:
    """Write the backbone of a checkpoint as a safetensors file with timm's names.

    `timm.create_model(name, num_classes=0, checkpoint_path=destination)` loads the file. The report gives the name and
    the arguments of the timm model as `architecture`.

    Args:
        source: As for `load_checkpoint`.
        destination: File to write, ending in .safetensors.
        model: Model to read the checkpoint for. None looks for a timm model that fits.
        checkpoint_key: As for `load_checkpoint`.
        allow_differences: As for `load_checkpoint`.

    Raises:
        ValueError: The checkpoint cannot be read, it fits no model, or the destination has another ending.
    """
    destination = os.fspath(destination)
    if not destination.endswith('.safetensors'):
        raise ValueError(
            f'Expected a destination that ends in .safetensors, got {destination!r}. timm tells the format of a file '
            'by its ending.'
        )
    checkpoint = open_checkpoint(source)
    plan, model = _plan(checkpoint, model, checkpoint_key, allow_differences)
    target = create_target(model)
    tensors = {}
    for batch in checkpoint.batches(plan.tensors):
        tensors.update({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in batch.items()})
    # timm refuses a file without the step counters of BatchNorm, and a checkpoint may lack them
    for name, shape in target.shapes.items():
        if name.endswith('num_batches_tracked'):
            tensors.setdefault(name, torch.zeros(shape, dtype=torch.long))
    report = plan.report
    metadata = {'format': 'pt', 'method': report.method, 'copy': report.copy, 'architecture': report.architecture}
    # load_checkpoint reads the normalization back from the metadata of the new file
    metadata.update({key: ' '.join(map(str, value)) for key, value in report.data_config.items()})
    with write_whole(destination) as temporary:
        save_file(tensors, temporary, metadata)
    return report


def _check_shapes(state: Dict[str, torch.Tensor], tensors: Dict[str, torch.Tensor], source: str) -> None:
    """Refuse tensors that do not have the shape of the model, before the first is copied: copying would repeat them."""
    wrong = [
        f'{name} {tuple(tensor.shape)} for {tuple(state[name].shape)}'
        for name, tensor in tensors.items()
        if tensor.shape != state[name].shape
    ]
    if wrong:
        raise ValueError(f'Expected the shapes of the model in {source!r}, got {few(wrong)}. The model is unchanged.')


def _fill(tensor: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor of a file into one of the model."""
    both = (tensor, source)
    is_plain = tensor.dtype == source.dtype and all(t.device.type == 'cpu' and t.is_contiguous() for t in both)
    # a tenth faster on one thread, which is what launchers of several processes give to each
    if is_plain and tensor.nbytes >= 2**16 and torch.get_num_threads() == 1:
        to, of = (t.detach().view(-1).view(torch.uint8).numpy() for t in both)
        np.copyto(to, of)
    else:
        tensor.copy_(source)


def _describe(checkpoint: Checkpoint, model: nn.Module) -> Optional[Description]:
    """What the config.json of a checkpoint says, None if it is of another architecture than the model."""
    description = describe(checkpoint.config, f'{CONFIG_NAME} of {checkpoint.source}')
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    return description if description is not None and description.architecture == architecture else None


def open_checkpoint(source: Union[str, os.PathLike], described: bool = False) -> Checkpoint:
    """Find the files of a checkpoint and read them, mapped into memory.

    Args:
        source: As for `load_checkpoint`.
        described: Read the config.json beside a single file too, if it is one of timm.

    Raises:
        ValueError: There is no checkpoint, or reading it would need to run code from it.
    """
    source = os.fspath(source)
    files = resolve_source(source, described)
    config = {**files.config, 'release': source} if source in RELEASES else files.config
    shown = split_url(source)[0] if '://' in source else source
    return read_files(shown, files.paths, config)


def read_npz(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Let timm read a JAX archive into a copy of the model, and return the tensors that it filled.

    timm's readers of such archives do not report what they filled. All parameters of the copy are NaN beforehand, so
    tensors that are still NaN afterwards were not in the archive.

    Raises:
        ValueError: timm cannot read JAX archives for this model, or this archive does not fit.
    """
    scratch = copy.deepcopy(model)
    load_pretrained = getattr(scratch, 'load_pretrained', None)
    if load_pretrained is None:
        raise ValueError(
            f'Expected a model for which timm reads JAX archives, {checkpoint.source!r} is one and '
            f'{type(model).__name__} has no reader. Take the PyTorch or safetensors file of the same weights.'
        )
    with torch.no_grad():
        for parameter in scratch.parameters():
            parameter.fill_(float('nan'))
    try:
        load_pretrained(checkpoint.files[0])
    except Exception as e:  # timm's readers expect an archive of their model, and fail in many ways on others
        raise ValueError(
            f'Expected a JAX archive of a {type(model).__name__} in {checkpoint.source!r}, timm cannot read it: '
            f'{clip(str(e)) or type(e).__name__}. Take the archive of this model, or its PyTorch file.'
        ) from e
    filled = {name: t for name, t in scratch.state_dict().items() if not t.is_floating_point() or not t.isnan().all()}
    return checkpoint._replace(tree=filled)


def _plan(
    checkpoint: Checkpoint, model: Optional[nn.Module], checkpoint_key: Optional[str], allow_differences: bool
) -> Tuple[Plan, nn.Module]:
    """Map a checkpoint onto a model, or onto the first timm model that fits if none is given. Returns both."""
    if model is None:
        if checkpoint.kind == 'npz':
            raise ValueError(
                f'Expected a model to read the JAX archive {checkpoint.source!r} for, got none. '
                'Give the timm model (--model NAME).'
            )
        found = fitting_architectures(checkpoint, 1, checkpoint_key)
        if not found:
            tried = '; '.join(map(str, candidates(checkpoint))) or 'its keys look like no known family'
            raise ValueError(
                f'Expected a network that timm has in {checkpoint.source!r}, none of those tried fits ({tried}), nor '
                'does any of them with the arguments that the shapes show. '
                'Give the model (--model NAME --model-kwargs KEY=VALUE ...) to see what is missing.'
            )
        architecture = found[0]
        if architecture.assumed:
            raise ValueError(
                f'Expected a network that timm has in {checkpoint.source!r}. It may be {architecture.call}, but '
                f'{architecture.assumed}. Give the model with the right number: {architecture.flags}.'
            )
        model = build_on_meta(architecture)
    else:
        architecture = architecture_of(model) or Architecture(type(model).__name__, {})
        if checkpoint.kind == 'npz':
            checkpoint = read_npz(model, checkpoint)
    plan = make_plan(
        create_target(model), checkpoint, checkpoint_key=checkpoint_key, allow_differences=allow_differences
    )
    report = dataclasses.replace(plan.report, architecture=str(architecture), model_args=dict(architecture.arguments))
    return plan._replace(report=report), model
