"""Find the backbone of a model among the tensors of a checkpoint

The known formats of `rules.py` are tried first, then all prefixes of the keys. The result, a mapping, has tensors of
the file under the names that they have in the model. The model is not changed.
"""

import contextlib
import io
import itertools
import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from timm.models import adapt_input_conv

from ..timm_model import Target
from .names.copies import choose_copy
from .read import parts_of, walk
from .renames import apply_rename, renames_for
from .rules import BLOCKS, HEADS, RULES, WRAPPERS, Rule

Tensors = Dict[str, torch.Tensor]

MIN_TENSORS = 8  # a dictionary with fewer tensors is not searched for a backbone
# A prefix is tried if it has at least this share of the backbone's number of tensors. The share is low because other
# libraries split or fuse some tensors of timm.
MIN_SHARE = 0.4

MAX_PATCH = 64  # pixels along a side of a patch
_PROJECTIONS = ('proj.weight', 'projection.weight', 'conv1.weight', 'patch_embedding.weight')

_WRAPPER = re.compile(rf'(^|(?<=\.))({"|".join(WRAPPERS)})\.')
_BLOCK = re.compile(BLOCKS)
_HEAD = re.compile(HEADS)


class Mapping(NamedTuple):
    """One way to read a checkpoint for a model.

    Attributes:
        container: Keys that lead to the state dict inside the file, joined by slashes.
        prefix: Start of the keys of the backbone. The names of the model lack it.
        rule: Row of RULES that the state dict matches.
        names: How the names inside the backbone were changed, '' if they were not.
        tensors: Tensors of the file by their names in the model, in the shapes of the model.
        missing: Names of the backbone's tensors that the file does not fill.
        wrong_shape: Shape in the file of each missing tensor that the file has in another shape.
        left_over: Names under the prefix that the model does not have.
        blocks: Names left over that belong to blocks of the network, not to a head: the file has another network.
        named: All tensors under the prefix by their new names, in the shapes of the file.
        unread: Names of tensors on which timm's filter fails. A file with such a tensor is never complete.
    """

    container: str
    prefix: str
    rule: Rule
    names: str
    tensors: Tensors
    missing: Tuple[str, ...]
    wrong_shape: Dict[str, Tuple[int, ...]]
    left_over: Tuple[str, ...]
    blocks: Tuple[str, ...]
    named: Tensors
    unread: Tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the file fills the whole backbone, and the model has all blocks of the file."""
        return not self.missing and not self.blocks and not self.unread

    @property
    def surplus(self) -> Tuple[str, ...]:
        """Names left over that belong to no known head: blocks, tokens, norms and whatever else the model lacks."""
        blocks = set(self.blocks)
        return tuple(name for name in self.left_over if name in blocks or not _HEAD.match(name))

    @property
    def label(self) -> str:
        """Container and prefix as a user writes them for `checkpoint_key`."""
        return '/'.join(filter(None, (self.container, self.prefix.rstrip('.')))) or 'the whole file'


def unwrap(tensors: Tensors) -> Tensors:
    """Remove the names of torch's wrappers (`module.`, `_orig_mod.`, ...) from the keys, wherever they stand."""
    keys = '\n'.join(tensors)
    if not any(f'{wrapper}.' in keys for wrapper in WRAPPERS):  # as in most files; a search of each key takes longer
        return tensors
    unwrapped = {_WRAPPER.sub('', key): tensor for key, tensor in tensors.items()}
    return unwrapped if len(unwrapped) == len(tensors) else tensors


def state_dicts(tree: Dict[str, Any]) -> List[Tuple[str, Tensors]]:
    """Path and tensors of each state dict in a file that is large enough for a backbone, with unwrapped keys."""
    return [(path, unwrap(tensors)) for path, tensors in walk(tree) if len(tensors) >= MIN_TENSORS]


def matches(rule: Rule, tree: Dict[str, Any], container: str, keys: str) -> bool:
    """Whether a state dict has the format that a rule describes.

    Args:
        rule: Row of RULES.
        tree: Contents of the whole file.
        container: Path of the state dict inside the file.
        keys: Keys of the state dict, one on each line, so that one search covers all of them.
    """
    return (
        (not rule.beside or rule.beside in tree)
        and re.fullmatch(rule.container, container) is not None
        and re.search(f'^({rule.signature})', keys, re.MULTILINE) is not None
    )


def strip(tensors: Tensors, prefix: str) -> Tensors:
    """Tensors whose keys start with a prefix, under their names without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def tensors_under(mapping: Mapping, tree: Dict[str, Any]) -> Tensors:
    """Tensors of a backbone by their names in the file, without the prefix."""
    return strip(dict(state_dicts(tree)).get(mapping.container, {}), mapping.prefix)


def _fit(target: Target, tensors: Tensors) -> Tuple[Tensors, Dict[str, Tuple[int, ...]]]:
    """Tensors that fit the model, in its shapes, and the shapes of those of the backbone that do not fit."""
    fitting, wrong_shape = {}, {}
    for name in tensors.keys() & target.shapes.keys():
        tensor = _in_shape(tensors[name], target.shapes[name], name.removesuffix('.weight') in target.first_conv)
        if tensor is not None:
            fitting[name] = tensor
        elif name in target.backbone:
            wrong_shape[name] = tuple(tensors[name].shape)
    return fitting, wrong_shape


def _in_shape(tensor: torch.Tensor, shape: torch.Size, sees_input: bool) -> Optional[torch.Tensor]:
    """Give a tensor the shape that the model has, or return None if that would change its meaning."""
    if tensor.is_meta and not hasattr(tensor, 'parts'):
        return None  # timm's filter computed with a placeholder of `renames.fuse`, so the values are not known
    if tensor.shape == shape:
        return tensor
    if [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]:
        return tensor.reshape(shape)
    if sees_input and tensor.shape[1:2] == (3,) and (tensor.shape[0], *tensor.shape[2:]) == (shape[0], *shape[2:]):
        return adapt_input_conv(shape[1], tensor)
    return None


def _is_huge_patch(name: str, tensor: torch.Tensor) -> bool:
    """Whether a patch projection is larger than any. timm's resampling takes the square of its area in memory."""
    is_projection = tensor.ndim in (4, 5) and name.endswith(_PROJECTIONS)
    return is_projection and tensor.shape[-2] * tensor.shape[-1] > MAX_PATCH**2


def apply_filter(target: Target, tensors: Tensors) -> Optional[Tensors]:
    """Apply timm's `checkpoint_filter_fn` of this architecture. None if there is no filter or it fails."""
    if target.filter_fn is None or any(_is_huge_patch(name, tensor) for name, tensor in tensors.items()):
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # that of EVA prints which parameters a model lacks
            return dict(target.filter_fn(dict(tensors), target.model))
    except Exception:  # a filter expects a file of its architecture, and fails in many ways on other files
        return None


def _namings(target: Target, tensors: Tensors) -> Iterator[Tuple[str, Tensors]]:
    """Ways to name the tensors of a backbone, each with a description. The first one keeps their names."""
    for rename in itertools.chain((None,), renames_for(tensors)):
        renamed = apply_rename(rename, tensors, target.shapes) if rename else tensors
        names = rename.name if rename else ''
        yield names, renamed
        filtered = apply_filter(target, renamed)
        if filtered is not None:
            yield ', '.join(filter(None, (names, "timm's filter"))), filtered


def fit_names(
    target: Target, container: str, prefix: str, rule: Rule, names: str, tensors: Tensors, unread: Tuple[str, ...] = ()
) -> Mapping:
    """Compare the tensors of a file with those of a model that have the same names.

    Args:
        target: The tensors of the model.
        container: As in Mapping.
        prefix: As in Mapping.
        rule: As in Mapping.
        names: As in Mapping.
        tensors: Tensors under the prefix by their new names.
        unread: As in Mapping.
    """
    fitting, wrong_shape = _fit(target, tensors)
    left_over = sorted(tensors.keys() - target.shapes.keys())
    return Mapping(
        container,
        prefix,
        rule,
        names,
        fitting,
        tuple(sorted(target.backbone - fitting.keys())),
        wrong_shape,
        tuple(left_over),
        tuple(name for name in left_over if _BLOCK.match(name) and not name.endswith('num_batches_tracked')),
        tensors,
        unread,
    )


def read_names(target: Target, container: str, prefix: str, tensors: Tensors, rule: Rule) -> Mapping:
    """Name the tensors under a prefix in the way that fills most of the model."""
    namings = _namings(target, strip(tensors, prefix))
    best = fit_names(target, container, prefix, rule, *next(namings))
    while not best.complete and (naming := next(namings, None)) is not None:
        best = max(best, fit_names(target, container, prefix, rule, *naming), key=rank)
    return best


def rank(mapping: Mapping) -> Tuple[int, int]:
    """Key to sort mappings by: more tensors with a name of the model are better, then fewer blocks left over.

    A tensor that has the right shape too counts twice.
    """
    return len(mapping.wrong_shape) - 2 * len(mapping.missing), -len(mapping.blocks)


def prefixes(target: Target, tensors: Tensors) -> List[str]:
    """Prefixes of the keys that end at a dot and have enough tensors for the backbone, short ones first."""
    counts: Dict[str, int] = {'': len(tensors)}
    for key in tensors:
        for dot in re.finditer(r'\.', key):
            start = key[: dot.end()]
            counts[start] = counts.get(start, 0) + 1
    return sorted((p for p, n in counts.items() if n >= MIN_SHARE * len(target.backbone)), key=lambda p: (len(p), p))


def search(target: Target, tree: Dict[str, Any], checkpoint_key: Optional[str] = None) -> List[Mapping]:
    """Find the mappings of a file onto a model.

    If a rule matches the file and gives a complete mapping, this is the result. The last rule is not tried for this,
    as it matches any file. Otherwise all prefixes are searched.

    Args:
        target: The tensors of the model.
        tree: Contents of the file.
        checkpoint_key: As for `load_checkpoint`. With a key no rule decides.

    Returns:
        The complete mappings that give the model different values. If none is complete, the one that fills most of the
        model. Empty if no prefix has enough tensors.
    """
    dicts = state_dicts(tree)
    rules: Dict[str, List[Rule]] = {}
    for path, tensors in dicts:
        keys = '\n'.join(tensors)
        rules[path] = [rule for rule in RULES if matches(rule, tree, path, keys)]
    found: List[Mapping] = []
    if checkpoint_key is None:
        for rule in RULES[:-1]:
            for path, tensors in dicts:
                if rule not in rules[path]:
                    continue
                for prefix in rule.prefixes:
                    mapping = read_names(target, path, prefix, tensors, rule)
                    if mapping.complete:
                        return [mapping]
                    found.append(mapping)
    for path, tensors in dicts:
        for prefix in prefixes(target, tensors):
            if checkpoint_key is None or _is_asked_for(checkpoint_key, path, prefix):
                found.append(read_names(target, path, prefix, tensors, rules[path][0]))
    found.sort(key=rank, reverse=True)
    complete = [mapping for mapping in found if mapping.complete]
    different: List[Mapping] = []
    for mapping in complete:
        if not any(_same(mapping, other) for other in different):
            different.append(mapping)
    if checkpoint_key is not None:
        return different or found[:1]
    best = {mapping.label: mapping for mapping in found if rank(mapping) == rank(found[0])}
    return _by_role(different or list(best.values())) or different or found[:1]


def _by_role(mappings: List[Mapping]) -> List[Mapping]:
    """The mapping of the copy that gradients train, if there are several copies and their names tell it."""
    choice = choose_copy([mapping.label for mapping in mappings]) if len(mappings) > 1 else None
    if choice is None:
        return []
    position, copy, why = choice
    mapping = mappings[position]
    rule = mapping.rule._replace(method='unknown method', prefixes=(mapping.prefix,), copy=copy, why=why)
    return [mapping._replace(rule=rule)]


def _is_asked_for(checkpoint_key: str, path: str, prefix: str) -> bool:
    """Whether a key of the user names this container, this prefix, or both joined by a slash."""
    key = _WRAPPER.sub('', checkpoint_key.strip('./') + '.').rstrip('.')
    prefix = prefix.rstrip('.')
    names = (path, prefix, f'{path}/{prefix}')
    return any(key == name or name.startswith((key + '.', key + '/')) for name in names)


def _same(one: Mapping, other: Mapping) -> bool:
    """Whether two mappings give the model the same values. Some files hold one copy under two names."""
    if one.tensors.keys() != other.tensors.keys():
        return False
    for name in one.tensors:
        parts, others = parts_of(one.tensors[name]), parts_of(other.tensors[name])
        if len(parts) != len(others):
            return False
        if not all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in zip(parts, others, strict=True)):
            return False
    return True
