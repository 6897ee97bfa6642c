"""Which tensors of a file are the backbone of a model: rules first, then a search over prefixes and names

Nothing is copied here and the model is not touched: a mapping is names of the model with tensors of the file.
"""

import re
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from timm.models import adapt_input_conv

from .read import walk
from .renames import apply_rename, renames_for
from .rules import BLOCKS, RULES, WRAPPERS, Rule
from .target import Target

Tensors = Dict[str, torch.Tensor]

MIN_TENSORS = 8  # of a dictionary that may hold a backbone
MIN_SHARE = 0.4  # of the model's tensors that a prefix must hold; libraries split some that timm fuses

_WRAPPER = re.compile(rf'(^|(?<=\.))({"|".join(WRAPPERS)})\.')
_BLOCK = re.compile(BLOCKS)


class Mapping(NamedTuple):
    """One reading of a file.

    Attributes:
        container: Path of keys to the state dict.
        prefix: What was taken off the keys.
        rule: Row of the table that the state dict looks like.
        names: How names inside the backbone were changed.
        tensors: Tensors by their names in the model, with its shapes.
        missing: Tensors of the backbone that are not among them.
        wrong_shape: Of these, the file's shape of those it has.
        left_over: Names of the file under the prefix that the model lacks.
    """

    container: str
    prefix: str
    rule: Rule
    names: str
    tensors: Tensors
    missing: Tuple[str, ...]
    wrong_shape: Dict[str, Tuple[int, ...]]
    left_over: Tuple[str, ...]

    @property
    def blocks(self) -> Tuple[str, ...]:
        """Left-over parts of the network itself."""
        return tuple(name for name in self.left_over if _BLOCK.match(name) and not name.endswith('num_batches_tracked'))

    @property
    def complete(self) -> bool:
        return not self.missing and not self.blocks

    @property
    def label(self) -> str:
        return '/'.join(filter(None, (self.container, self.prefix.rstrip('.')))) or 'the whole file'


def unwrap(tensors: Tensors) -> Tensors:
    """Take the names of torch's wrappers out of the keys, wherever they stand."""
    unwrapped = {_WRAPPER.sub('', key): tensor for key, tensor in tensors.items()}
    return unwrapped if len(unwrapped) == len(tensors) else tensors


def state_dicts(tree: Dict[str, object]) -> List[Tuple[str, Tensors]]:
    """State dicts in a file that are large enough, by their paths, with unwrapped keys."""
    return [(path, unwrap(tensors)) for path, tensors in walk(tree) if len(tensors) >= MIN_TENSORS]


def matches(rule: Rule, tree: Dict[str, object], container: str, keys: str) -> bool:
    """Whether a state dict looks as a row says. Its keys are given a line each, for one search instead of hundreds."""
    return (
        (not rule.beside or rule.beside in tree)
        and re.fullmatch(rule.container, container) is not None
        and re.search(f'^({rule.signature})', keys, re.MULTILINE) is not None
    )


def strip(tensors: Tensors, prefix: str) -> Tensors:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _fit(target: Target, tensors: Tensors) -> Tuple[Tensors, Dict[str, Tuple[int, ...]]]:
    """Tensors that the model has, with its shapes, and the shapes of those that do not fit."""
    fitting, wrong_shape = {}, {}
    for name in tensors.keys() & target.shapes.keys():
        tensor = _in_shape(tensors[name], target.shapes[name], name.removesuffix('.weight') in target.first_conv)
        if tensor is not None:
            fitting[name] = tensor
        elif name in target.backbone:
            wrong_shape[name] = tuple(tensors[name].shape)
    return fitting, wrong_shape


def _in_shape(tensor: torch.Tensor, shape: torch.Size, sees_input: bool) -> Optional[torch.Tensor]:
    """A tensor in another shape of the same meaning, None where there is none."""
    if tensor.is_meta and not hasattr(tensor, 'parts'):
        return None  # a reader changed a tensor that stands for several, so its values are not known
    if tensor.shape == shape:
        return tensor
    if [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]:
        return tensor.reshape(shape)
    if sees_input and tensor.shape[1:2] == (3,) and (tensor.shape[0], *tensor.shape[2:]) == (shape[0], *shape[2:]):
        return adapt_input_conv(shape[1], tensor)
    return None


def _filtered(target: Target, tensors: Tensors) -> Optional[Tensors]:
    """What timm's own reader of this architecture makes of the tensors, None where it cannot read them."""
    try:
        return dict(target.filter_fn(dict(tensors), target.model))
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError):
        return None  # these readers expect files of their architecture and check nothing


def read_names(target: Target, container: str, prefix: str, tensors: Tensors, rule: Rule) -> Mapping:
    """The reading of the names under a prefix that fills most of the model."""
    stripped = strip(tensors, prefix)
    best = None
    for rename in (None, *renames_for(stripped)):
        renamed = apply_rename(rename, stripped) if rename else stripped
        for filtered in (False, True) if target.filter_fn else (False,):
            candidate = _filtered(target, renamed) if filtered else renamed
            if candidate is None:
                continue
            fitting, wrong_shape = _fit(target, candidate)
            names = ', '.join(filter(None, (rename.name if rename else '', "timm's filter" if filtered else '')))
            mapping = Mapping(
                container,
                prefix,
                rule,
                names,
                fitting,
                tuple(sorted(target.backbone - fitting.keys())),
                wrong_shape,
                tuple(sorted(candidate.keys() - target.shapes.keys())),
            )
            if mapping.complete:
                return mapping
            if best is None or rank(mapping) > rank(best):
                best = mapping
    return best


def rank(mapping: Mapping) -> Tuple[int, int]:
    """How much of the model a reading fills, and then how little of the network it leaves over."""
    return -len(mapping.missing), -len(mapping.blocks)


def prefixes(target: Target, tensors: Tensors) -> List[str]:
    """Dotted prefixes that hold enough tensors, short ones first."""
    counts: Dict[str, int] = {'': len(tensors)}
    for key in tensors:
        for dot in re.finditer(r'\.', key):
            start = key[: dot.end()]
            counts[start] = counts.get(start, 0) + 1
    return sorted((p for p, n in counts.items() if n >= MIN_SHARE * len(target.backbone)), key=lambda p: (len(p), p))


def search(target: Target, tree: Dict[str, object], checkpoint_key: Optional[str] = None) -> List[Mapping]:
    """Readings of a file, complete ones only if there are any, else the best.

    A row of the table that fits decides, except the last, which fits all files. Without one, all that differ are
    returned.
    """
    dicts = [(path, tensors, '\n'.join(tensors)) for path, tensors in state_dicts(tree)]
    found: List[Mapping] = []
    if checkpoint_key is None:
        for rule in RULES[:-1]:
            for path, tensors, keys in dicts:
                if not matches(rule, tree, path, keys):
                    continue
                for prefix in rule.prefixes:
                    mapping = read_names(target, path, prefix, tensors, rule)
                    if mapping.complete:
                        return [mapping]
                    found.append(mapping)
    for path, tensors, keys in dicts:
        rule = next(rule for rule in RULES if matches(rule, tree, path, keys))
        for prefix in prefixes(target, tensors):
            if checkpoint_key is None or _is_asked_for(checkpoint_key, path, prefix):
                found.append(read_names(target, path, prefix, tensors, rule))
    found.sort(key=rank, reverse=True)
    complete = [mapping for mapping in found if mapping.complete]
    different: List[Mapping] = []
    for mapping in complete:
        if not any(_same(mapping, other) for other in different):
            different.append(mapping)
    return different or found[:1]


def _is_asked_for(checkpoint_key: str, path: str, prefix: str) -> bool:
    """Whether a key names this container, this prefix, or both with a slash between them."""
    key = _WRAPPER.sub('', checkpoint_key.strip('./') + '.').rstrip('.')
    prefix = prefix.rstrip('.')
    names = (path, prefix, f'{path}/{prefix}')
    return any(key == name or name.startswith((key + '.', key + '/')) for name in names)


def _sources(tensor: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    return getattr(tensor, 'parts', (tensor,))


def _same(one: Mapping, other: Mapping) -> bool:
    """Whether two readings give the model the same values, for some files hold a copy under two names."""
    if one.tensors.keys() != other.tensors.keys():
        return False
    for name in one.tensors:
        sources, others = _sources(one.tensors[name]), _sources(other.tensors[name])
        if len(sources) != len(others):
            return False
        if not all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in zip(sources, others, strict=True)):
            return False
    return True
