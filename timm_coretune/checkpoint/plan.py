"""Plan which tensors of a checkpoint go into a model, and check them before the model is changed"""

import math
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch

from ..checks import clip
from ..timm_model import Target
from .advice.closest import closest
from .advice.explain import explain, is_most, other_form
from .differences import contradictions, differences, unknowns
from .mapping import Mapping, search, state_dicts, tensors_under
from .pretraining import data_config, other_windows, resampled_patches, several_frames
from .read import Checkpoint
from .report import CheckpointReport, few
from .rules import HEADS, REFUSALS


class Plan(NamedTuple):
    """What is to be loaded.

    Attributes:
        report: Report of the load.
        tensors: Tensors of the file by their names in the model.
    """

    report: CheckpointReport
    tensors: Dict[str, torch.Tensor]


def make_plan(
    target: Target,
    checkpoint: Checkpoint,
    load_classifier: bool = False,
    checkpoint_key: Optional[str] = None,
    allow_partial: bool = False,
    allow_differences: bool = False,
) -> Plan:
    """Map a checkpoint onto a model and check the result, without changing the model.

    Args:
        target: The tensors of the model.
        checkpoint: The checkpoint.
        load_classifier: As for `load_checkpoint`.
        checkpoint_key: As for `load_checkpoint`.
        allow_partial: As for `load_checkpoint`.
        allow_differences: As for `load_checkpoint`.

    Raises:
        ValueError: The checkpoint does not fit the model, was made for another network, or has values that are not
            finite.
    """
    mapping = _choose(target, checkpoint, checkpoint_key)
    source = tensors_under(mapping, checkpoint.tree)
    notes = (*unknowns(mapping, target.model, checkpoint.config), *resampled_patches(target.model, source))
    frames = several_frames(target.model, source, checkpoint.config)
    missing = [] if mapping.complete else [explain(target, checkpoint, mapping, checkpoint_key)]
    different = contradictions(mapping, target.model, checkpoint.config)
    if mapping.complete:
        compared = differences(target.model, checkpoint.config)
        if compared:
            compared[-1] += ' --allow-differences (allow_differences) loads the checkpoint nevertheless.'
        different += compared
    notes = (*notes, *other_windows(target.model, source, checkpoint.config))
    refused = [*frames, *missing, *different]
    if refused:
        # a file with less than half of the network has another network
        partial_allowed = allow_partial and is_most(target, mapping)
        if missing and not partial_allowed:
            raise ValueError(' '.join([*frames, *missing]))  # the advice in it covers what differs
        if frames or not (allow_partial or allow_differences):
            raise ValueError(' '.join(refused if missing else [*refused, f'This is about {checkpoint.source!r}.']))
        notes = (' '.join(refused), *notes)
    has_classifier = bool(load_classifier and target.classifier and target.classifier <= mapping.tensors.keys())
    tensors = {
        name: tensor for name, tensor in mapping.tensors.items() if has_classifier or name not in target.classifier
    }
    check_values(checkpoint, tensors, target)
    return Plan(_report(target, checkpoint, mapping, tensors, has_classifier, notes, checkpoint_key), tensors)


def _choose(target: Target, checkpoint: Checkpoint, checkpoint_key: Optional[str]) -> Mapping:
    """Map a file onto a model, and refuse a file that could be read in no way or in several ways."""
    _refuse_known(checkpoint, target)
    mappings = search(target, checkpoint.tree, checkpoint_key)
    if not mappings or not mappings[0].complete:
        mappings = closest(target, checkpoint.tree, checkpoint_key, mappings)
    if not mappings:
        dicts = [f'{path or "top"} ({len(tensors)} tensors)' for path, tensors in state_dicts(checkpoint.tree)]
        if checkpoint_key:
            raise ValueError(
                f'Expected {checkpoint_key!r} to name a copy of the backbone in {checkpoint.source!r}, found '
                f'{few(dicts) if dicts else "no state dict"} and no such prefix with enough tensors.'
            )
        raise ValueError(
            other_form(checkpoint, target)
            or f'Expected tensors by name in {checkpoint.source!r}, enough for a {type(target.model).__name__}, found '
            f'{few(dicts) if dicts else f"only {few(map(str, checkpoint.tree))}"}.'
        )
    if len(mappings) > 1:
        raise ValueError(
            f'Expected one backbone in {checkpoint.source!r}, found {len(mappings)} that differ, and no known method '
            f'that writes such a file. Choose one with checkpoint_key (train.py: --checkpoint-key): '
            f'{few([mapping.label for mapping in mappings], 20)}.'
        )
    return mappings[0]


def _refuse_known(checkpoint: Checkpoint, target: Target) -> None:
    """Refuse a file with a network of REFUSALS, unless the model has the tensor that tells it apart."""
    for _, tensors in state_dicts(checkpoint.tree):
        keys = '\n'.join(tensors)
        for refusal in REFUSALS:
            if not re.search(f'^({refusal.key})', keys, re.MULTILINE):  # faster than a search of each key
                continue
            for key, tensor in tensors.items():
                if not re.match(refusal.key, key) or (refusal.shape and tuple(tensor.shape) != refusal.shape):
                    continue
                if not any(shape == tensor.shape and key.endswith(name) for name, shape in target.shapes.items()):
                    raise ValueError(
                        f'Expected a network that timm has in {checkpoint.source!r}, got {refusal.what} '
                        f'({clip(key)}). {refusal.why}'
                    )


def total(tensor: torch.Tensor) -> float:
    """A sum over all elements of a tensor, which is finite only if all of them are."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.numel() < 2**16:
        return float(tensor.sum(dtype=torch.float32))
    # the product of both halves, as memory is read faster at two places
    half = tensor.numel() // 2
    flat = tensor.view(-1)
    return float(torch.dot(flat[:half], flat[half : 2 * half])) + float(flat[2 * half :].sum())


def check_values(checkpoint: Checkpoint, tensors: Dict[str, torch.Tensor], target: Target) -> None:
    """Refuse quantised weights and values that are not finite.

    Raises:
        ValueError: A tensor has a dtype for quantised weights, or holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        is_weight = tensor.is_floating_point() and tensor.element_size() > 1
        if target.dtypes[name].is_floating_point and not is_weight:
            raise ValueError(
                f'Expected weights in {checkpoint.source!r}, {name} holds {tensor.dtype}. '
                'Quantised checkpoints are not supported: take the checkpoint from before the quantisation.'
            )
    bad: List[str] = []
    for batch in checkpoint.batches({k: v for k, v in tensors.items() if v.is_floating_point()}):
        # a finite sum has finite terms only; a sum that is not finite may have overflowed, so its terms are tested
        bad += [
            name
            for name, tensor in batch.items()
            if not math.isfinite(total(tensor)) and not torch.isfinite(tensor.to(target.dtypes[name])).all()
        ]
    if bad:
        raise ValueError(
            f'Expected finite weights in {checkpoint.source!r}, found NaN or infinity in {few(bad)}. '
            'The pretraining diverged or the file is damaged: take an earlier checkpoint.'
        )


def _report(
    target: Target,
    checkpoint: Checkpoint,
    mapping: Mapping,
    tensors: Dict[str, torch.Tensor],
    has_classifier: bool,
    notes: Tuple[str, ...],
    checkpoint_key: Optional[str],
) -> CheckpointReport:
    """Report what a mapping takes from the checkpoint and what it leaves there."""
    container = next((t for path, t in state_dicts(checkpoint.tree) if path == mapping.container), {})
    source = tensors_under(mapping, checkpoint.tree)
    storages = {tensor.untyped_storage().data_ptr() for tensor in source.values()}
    outside = [key for key in container if not key.startswith(mapping.prefix)]
    blocks = set(mapping.blocks)
    under = [mapping.prefix + name for name in mapping.left_over if name not in blocks]
    heads = [key for key in under if re.match(HEADS, key[len(mapping.prefix) :])]
    fresh = target.fresh - tensors.keys()
    known = mapping.prefix in mapping.rule.prefixes
    copy, why = (mapping.rule.copy, mapping.rule.why) if known else (mapping.label, 'the only part that fits')
    if checkpoint_key is not None:
        copy, why = mapping.label, 'asked for'
    if fresh:
        under = [key for key in under if not key.startswith(mapping.prefix + 'norm.')]
        notes = (
            *notes,
            f'{few(fresh)} start fresh: the model normalizes after the pooling, the pretrained network before it',
        )
    return CheckpointReport(
        source=checkpoint.source,
        kind=checkpoint.kind,
        method=mapping.rule.method if known else 'unknown method',
        container=mapping.container,
        prefix=mapping.prefix,
        copy=copy,
        why=why,
        names=mapping.names,
        # the step counters of BatchNorm are counted only if the file has them
        total=len(target.backbone | {name for name in tensors if name.endswith('num_batches_tracked')}),
        loaded=tuple(sorted(tensors)),
        classifier=has_classifier,
        renamed=tuple(sorted(name for name in tensors if name not in source)),
        resized=tuple(
            sorted(
                name
                for name, tensor in tensors.items()
                if not hasattr(tensor, 'parts') and tensor.untyped_storage().data_ptr() not in storages
            )
        ),
        cast=tuple(sorted(name for name, tensor in tensors.items() if tensor.dtype != target.dtypes[name])),
        dropped=tuple(sorted([*outside, *heads])),
        missing=tuple(sorted([*mapping.missing, *fresh])),
        left_over=tuple(sorted({*under, *(mapping.prefix + n for n in mapping.blocks)} - set(heads))),
        data_config=data_config(mapping, target.model, source, checkpoint.config),
        notes=notes,
        left_out={name: number for name, number in checkpoint.left_out.items() if number > 0},
    )
