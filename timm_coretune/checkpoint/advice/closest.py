"""The reading of a file that shares most names with a model, for a message about a file that does not fit"""

import re
from collections import Counter
from typing import Any, Dict, Iterator, List, Optional

from ...timm_model import Target
from ..mapping import Mapping, Tensors, apply_filter, fit_names, matches, rank, read_names, state_dicts, strip
from ..mapping import _is_asked_for as is_asked_for
from ..renames import apply_rename, renames_for
from ..rules import BLOCKS, RULES, Rule

MOST_PREFIXES = 3  # prefixes in front of blocks that are tried, those with most tensors first
MOST_TENSORS = 1024  # with more of them, timm's filter is not asked about each on its own

_BEFORE_BLOCKS = re.compile(rf'(^|.*?\.)({BLOCKS})')


def closest(target: Target, tree: Dict[str, Any], checkpoint_key: Optional[str], found: List[Mapping]) -> List[Mapping]:
    """The reading that shares most names with the model, of those found and of some that fit too little to be found.

    These are prefixes with few tensors, as a network of less depth has, and files on some of whose tensors timm's
    filter fails.

    Args:
        target: The tensors of the model.
        tree: Contents of the file.
        checkpoint_key: As for `load_checkpoint`.
        found: Result of `search`, without a complete mapping.

    Returns:
        One mapping, or none if the file has no state dict that is large enough.
    """
    readings = list(found)
    for path, tensors in state_dicts(tree):
        rule = next(rule for rule in RULES if matches(rule, tree, path, '\n'.join(tensors)))
        tried = {mapping.prefix for mapping in found if mapping.container == path}
        for prefix in _before_blocks(tensors):
            if checkpoint_key is not None and not is_asked_for(checkpoint_key, path, prefix):
                continue
            if prefix not in tried:
                readings.append(read_names(target, path, prefix, tensors, rule))
            if not any(is_related(mapping, target) for mapping in readings):
                readings.extend(_in_parts(target, path, prefix, tensors, rule))
    return sorted(readings, key=rank, reverse=True)[:1]


def is_related(mapping: Mapping, target: Target) -> bool:
    """Whether at least half of the names of the file or of the model are common to both."""
    shared = len(target.backbone) - len(mapping.missing) + len(mapping.wrong_shape)
    return 2 * shared >= min(len(target.backbone), len(mapping.named))


def _before_blocks(tensors: Tensors) -> List[str]:
    """Starts of the keys in front of the blocks of a network, those with most tensors first."""
    counts = Counter(found[1] for key in tensors if (found := _BEFORE_BLOCKS.match(key)))
    return [prefix for prefix, _ in counts.most_common(MOST_PREFIXES)]


def _in_parts(target: Target, path: str, prefix: str, tensors: Tensors, rule: Rule) -> Iterator[Mapping]:
    """Readings without the tensors on which timm's filter fails, such as those of blocks that the model lacks."""
    if target.filter_fn is None:
        return
    source = strip(tensors, prefix)
    for rename in (None, *renames_for(source)):
        renamed = apply_rename(rename, source) if rename else source
        if len(renamed) > MOST_TENSORS or apply_filter(target, renamed) is not None:
            continue  # the whole is read, so `read_names` has tried it
        unread = {name: tensor for name, tensor in renamed.items() if apply_filter(target, {name: tensor}) is None}
        filtered = apply_filter(target, {name: tensor for name, tensor in renamed.items() if name not in unread})
        if filtered is not None and unread:
            names = ', '.join(filter(None, (rename.name if rename else '', "timm's filter")))
            yield fit_names(target, path, prefix, rule, names, {**unread, **filtered}, tuple(sorted(unread)))
