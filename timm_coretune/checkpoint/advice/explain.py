"""The error for a checkpoint that does not fit a model: what differs, and the call for a model that it fits"""

from typing import List, Optional, Tuple

import torch.nn as nn

from ...checks import clip
from ...timm_model import Target
from ..architectures import BUILD_ERRORS, Architecture, architecture_of, build_on_meta
from ..differences import contradictions, differences
from ..mapping import Mapping, state_dicts
from ..read import Checkpoint
from ..report import few
from .closest import is_related
from .fit import fitting_architectures

MOST_TOKENS = 16  # a larger difference of position embeddings comes from the size of the image

# Keys that tell what a file is, if it holds no weights as timm has them: part of a key, what the file is, what to do
_OTHER_FORMS: Tuple[Tuple[str, str, str], ...] = (
    ('_flat_param', 'sharded weights of FSDP',
     'Save it again with a full state dict (StateDictType.FULL_STATE_DICT), or merge its parts with '
     '`accelerate merge-weights`.'),
    ('.parametrizations.', 'weights under a parametrization',
     'Save it again after torch.nn.utils.parametrize.remove_parametrizations.'),
    ('weight_g', 'weights under a weight norm', 'Save it again after torch.nn.utils.remove_weight_norm.'),
)  # fmt: skip


def explain(target: Target, checkpoint: Checkpoint, mapping: Mapping, checkpoint_key: Optional[str]) -> str:
    """Error message for a file that does not fit a model.

    Args:
        target: The tensors of the model.
        checkpoint: The checkpoint.
        mapping: The reading of the file that shares most names with the model.
        checkpoint_key: As for `load_checkpoint`.
    """
    other = _divided(checkpoint, target, mapping) or other_form(checkpoint, target)
    if other:
        return other
    own = architecture_of(target.model)
    if own is None:
        return _explain_foreign(target, checkpoint, mapping, checkpoint_key)
    found = fitting_architectures(checkpoint, 3, checkpoint_key, own)
    wrong = '' if found else ''.join(f' {text}' for text in contradictions(mapping, target.model, checkpoint.config))
    partial = ' allow_partial (--allow-partial) loads what fits.' if is_most(target, mapping) else ''
    return (
        f'{_compare(target, checkpoint, mapping)} The model must be the architecture that was pretrained. '
        f'{advise(found, checkpoint)}{wrong}{partial}'
    )


def is_most(target: Target, mapping: Mapping) -> bool:
    """Whether the file fills at least half of the backbone, which is what a partial load needs."""
    return 2 * len(mapping.missing) <= len(target.backbone)


def _compare(target: Target, checkpoint: Checkpoint, mapping: Mapping) -> str:
    """What of the model is missing in the file, what has another shape, and what the model has no place for."""
    shapes = [f'{name} {shape} for {tuple(target.shapes[name])}' for name, shape in mapping.wrong_shape.items()]
    absent = [name for name in mapping.missing if name not in mapping.wrong_shape]
    parts = [
        f'{len(names)} {what} ({few(names)})'
        for names, what in (
            (absent, 'are missing'),
            (shapes, 'have another shape' if absent else 'are missing because they have another shape'),
            (mapping.surplus, 'of the file have no place in the model'),
        )
        if names
    ]
    names = f', {mapping.names}' if mapping.names else ''
    more = _more_positions(target, mapping)
    if more:
        parts.append(more)
    return (
        f'Expected all {len(target.backbone)} backbone tensors of {type(target.model).__name__} in '
        f'{checkpoint.source!r}, read as {mapping.rule.method} at {clip(mapping.label)}{names}: {"; ".join(parts)}.'
    )


def _more_positions(target: Target, mapping: Mapping) -> str:
    """How many tokens the file has more or less than the model, if the position embeddings differ by a few."""
    file, built = mapping.wrong_shape.get('pos_embed', ()), target.shapes.get('pos_embed', ())
    if len(file) != 3 or len(built) != 3 or file[2] != built[2] or abs(file[1] - built[1]) > MOST_TOKENS:
        return ''
    count, more = abs(file[1] - built[1]), 'more' if file[1] > built[1] else 'less'
    return (
        f'it has {count} position embedding(s) {more} than the model, as with another number of class, distillation or '
        'register tokens'
    )


def advise(found: List[Architecture], checkpoint: Checkpoint) -> str:
    """Sentence that names the models which a checkpoint fits, and the calls that create them."""
    if not found:
        return 'None of the timm models tried fits it, nor does any with the arguments that its shapes show.'
    first = found[0]
    names = ' or '.join(dict.fromkeys(architecture.name for architecture in found))
    calls = ' or '.join(architecture.call for architecture in found)
    assumed = f' Check this: {first.assumed}.' if first.assumed else ''
    return f'It fits {names}: create it with {calls} (train.py: {first.flags}).{assumed}{_beyond(first, checkpoint)}'


def _beyond(architecture: Architecture, checkpoint: Checkpoint) -> str:
    """What the config beside the checkpoint asks for beyond the shapes, as a sentence."""
    try:
        found = differences(build_on_meta(architecture), checkpoint.config)
    except BUILD_ERRORS:
        return ''
    return ''.join(f' {text}' for text in found)


def other_form(checkpoint: Checkpoint, target: Target) -> str:
    """Error for a file whose weights have another form than in a network, '' if it is no such file."""
    for part, what, fix in _OTHER_FORMS:
        names = [name for _, tensors in state_dicts(checkpoint.tree) for name in tensors if part in name]
        if names:
            return (
                f'Expected the weights of {type(target.model).__name__} in {checkpoint.source!r}, got {what} '
                f'({few(names)}). {fix}'
            )
    return ''


def _divided(checkpoint: Checkpoint, target: Target, mapping: Mapping) -> str:
    """Error for a file whose tensors are empty, since other files have their values. '' if it is no such file."""
    empty = [name for name, shape in mapping.wrong_shape.items() if 0 in shape]
    if 2 * len(empty) <= len(target.backbone):
        return ''
    return (
        f'Expected the weights of {type(target.model).__name__} in {checkpoint.source!r}, its tensors at '
        f'{clip(mapping.label)} are empty ({len(empty)} of {len(target.backbone)}): the weights are divided among the '
        'files of several processes, as by ZeRO stage 3 of DeepSpeed. Join them with the script that DeepSpeed writes '
        'beside them (python zero_to_fp32.py . OUTPUT) and load what it writes.'
    )


def _explain_foreign(target: Target, checkpoint: Checkpoint, mapping: Mapping, checkpoint_key: Optional[str]) -> str:
    """Error for a model that timm did not create: the timm model inside it, or the one that takes its place."""
    model = target.model
    kind = f'{type(model).__name__} of {type(model).__module__}'
    inner = _inside(model)
    if inner:
        return (
            f'Expected a model of timm, got {kind}, which holds one as {inner!r}. Load the checkpoint into that: '
            f'load_checkpoint(model.{inner}, ...).'
        )
    if type(model).__name__.startswith('Feature'):
        return (
            f'Expected a whole model of timm, got {kind}, whose tensors timm renames for features_only. Load the '
            'checkpoint into the model without features_only, or convert it (timm-coretune checkpoint convert) and '
            'pass pretrained_cfg_overlay=dict(file=...) to timm.create_model.'
        )
    equivalents = fitting_architectures(checkpoint._replace(tree=dict(model.state_dict()), config={}), 1)
    found = fitting_architectures(checkpoint, 1, checkpoint_key, equivalents[0] if equivalents else None)
    same = f' In timm the network passed is {equivalents[0].call}.' if equivalents else ''
    compared = f' {_compare(target, checkpoint, mapping)}' if is_related(mapping, target) else ''
    return f'Expected a model of timm, got {kind}.{compared}{same} {advise(found, checkpoint)}'


def _inside(model: nn.Module) -> str:
    """Name of the first timm model inside a module, '' if there is none."""
    return next((name for name, part in model.named_modules() if name and architecture_of(part) is not None), '')
