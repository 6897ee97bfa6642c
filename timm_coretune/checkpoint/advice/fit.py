"""Find the timm model that a checkpoint fits, with the arguments that the shapes in it show

Every model that is named was built without memory, and the checkpoint was mapped onto it.
"""

import fnmatch
import re
from typing import List, NamedTuple, Optional, Tuple

from timm.models import list_models

from ...timm_model import Target
from ..architectures import BUILD_ERRORS, Architecture, candidates, fitting_models, target_of
from ..differences import contradictions, other_activation, trained_num_heads
from ..mapping import Mapping, search, state_dicts, tensors_under
from ..read import Checkpoint
from .arguments import RESIZABLE, Arguments, Change, Reading, shown_arguments
from .closest import closest, is_related

ROUNDS = 5  # times that a model is built again, as some arguments show only once others are right
# What counts as much as so many arguments: another depth or width, and another model than that of the user
OTHER_SIZE, OTHER_MODEL = 2, 2
_SIZES = frozenset({'depth', 'depths', 'layers', 'embed_dim', 'dims'})
MOST_TENSORS = 4_000  # few networks have more of them, and the search takes time for each
MOST_SIBLINGS = 12  # models of similar names that are tried, such as the sizes of an EfficientNet


class _Attempt(NamedTuple):
    """A model, how the checkpoint reads for it, and what would have to change."""

    architecture: Architecture
    target: Target
    mapping: Mapping
    change: Change

    @property
    def new(self) -> List[str]:
        """Names of the arguments that would have to change."""
        given = self.architecture.arguments
        return [key for key, value in self.change.arguments.items() if key not in given or given[key] != value]


def fitting_architectures(
    checkpoint: Checkpoint, most: int, checkpoint_key: Optional[str] = None, own: Optional[Architecture] = None
) -> List[Architecture]:
    """Find timm models that a checkpoint fits, with arguments if it fits none as it is.

    Args:
        checkpoint: The checkpoint.
        most: Largest number of models to find.
        checkpoint_key: As for `load_checkpoint`.
        own: The model of the user, which is tried with other arguments before other models are.

    Returns:
        Several models only if the checkpoint fits all of them without further arguments than the size of image and
        patches.
    """
    if any(len(tensors) > MOST_TENSORS for _, tensors in state_dicts(checkpoint.tree)):
        return []
    exact = fitting_models(checkpoint, most, checkpoint_key)
    if exact:
        return [adapt(architecture, checkpoint, checkpoint_key) or architecture for architecture in exact]
    given = own.arguments if own else {}
    mine = _attempt(own, checkpoint, checkpoint_key) if own else None
    best = _finish(mine, checkpoint, checkpoint_key) if mine and _cost(mine) < (False, OTHER_MODEL + 2) else None
    if best is None:
        listed = candidates(checkpoint)
        others = [Architecture(a.name, {**_of_any_size(given), **a.arguments}) for a in listed]
        if 'embed_dim' in given:  # a network of its own size, which another architecture can have too
            others += [Architecture(a.name, {**given, **a.arguments}) for a in listed]
        best = _best(mine, others, checkpoint, checkpoint_key)
    if best is None and own is not None:
        siblings = [Architecture(name, _of_any_size(given)) for name in _siblings(own.name)]
        best = _best(None, siblings, checkpoint, checkpoint_key)
    return [best] if best else []


def _of_any_size(arguments: Arguments) -> Arguments:
    """Arguments without those that belong to the size of one network, such as its number of heads."""
    return {key: value for key, value in arguments.items() if key not in (*_SIZES, 'num_heads', 'mlp_ratio')}


def adapt(architecture: Architecture, checkpoint: Checkpoint, checkpoint_key: Optional[str]) -> Optional[Architecture]:
    """Give a model the arguments that a checkpoint shows, until the checkpoint fits. None if it never does."""
    return _finish(_attempt(architecture, checkpoint, checkpoint_key), checkpoint, checkpoint_key)


def _cost(attempt: _Attempt) -> Tuple[bool, int]:
    """Key to sort attempts by: those without assumptions first, then those with few changes."""
    return bool(attempt.change.assumed), len(attempt.new) + OTHER_SIZE * bool(_SIZES & set(attempt.new))


def _best(
    mine: Optional[_Attempt], others: List[Architecture], checkpoint: Checkpoint, checkpoint_key: Optional[str]
) -> Optional[Architecture]:
    """The model that fits at the least cost: that of the user, or one of the others."""
    attempts = [a for other in others if (a := _attempt(other, checkpoint, checkpoint_key)) is not None]
    ranked = [(_cost(attempt), 1, attempt) for attempt in attempts]
    if mine is not None:
        assumes, cost = _cost(mine)
        ranked.append(((assumes, cost - OTHER_MODEL), 0, mine))
    for _, _, attempt in sorted(ranked, key=lambda row: row[:2]):
        found = _finish(attempt, checkpoint, checkpoint_key)
        if found is not None:
            return found
    return None


def _attempt(architecture: Architecture, checkpoint: Checkpoint, checkpoint_key: Optional[str]) -> Optional[_Attempt]:
    """Build a model and compare it with a checkpoint. None if it cannot be built, or shares few names with it."""
    try:
        target = target_of(architecture)
    except BUILD_ERRORS:
        return None
    mappings = search(target, checkpoint.tree, checkpoint_key)
    if not mappings or not mappings[0].complete:
        mappings = closest(target, checkpoint.tree, checkpoint_key, mappings)
    if not mappings or not is_related(mappings[0], target):
        return None
    mapping = mappings[0]
    width = mapping.named.get('blocks.0.norm1.weight')
    heads = trained_num_heads(mapping, 0 if width is None else width.numel(), checkpoint.config)
    fixed = frozenset(RESIZABLE) & architecture.arguments.keys()
    activation = other_activation(mapping, target.model, checkpoint.config)
    reading = Reading(mapping, tensors_under(mapping, checkpoint.tree), target, heads, activation, fixed)
    return _Attempt(architecture, target, mapping, shown_arguments(reading))


def _finish(
    attempt: Optional[_Attempt], checkpoint: Checkpoint, checkpoint_key: Optional[str]
) -> Optional[Architecture]:
    """Change arguments until nothing is left to change. None if the checkpoint does not fit then."""
    assumed = ''
    for _ in range(ROUNDS):
        if attempt is None:
            return None
        if not attempt.new:
            wrong = contradictions(attempt.mapping, attempt.target.model, checkpoint.config)
            fits = attempt.mapping.complete and not wrong
            return attempt.architecture._replace(assumed=assumed) if fits else None
        assumed = attempt.change.assumed or assumed
        arguments = {**attempt.architecture.arguments, **attempt.change.arguments}
        attempt = _attempt(attempt.architecture._replace(arguments=arguments), checkpoint, checkpoint_key)
    return None


def _siblings(name: str) -> List[str]:
    """timm models whose names differ from this one in their digits only, as the sizes of an EfficientNet do."""
    pattern = re.sub(r'\d', '?', name)
    names = fnmatch.filter(list_models(), pattern) if '?' in pattern else []
    return [n for n in names if n != name and re.sub(r'\d', '?', n) == pattern][:MOST_SIBLINGS]
