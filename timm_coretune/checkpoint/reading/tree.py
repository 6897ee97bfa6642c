"""Reduce what a file holds to nested dictionaries of plain tensors, within limits"""

import collections
import math
from typing import Any, Dict

import torch

from ...checks import clip
from .limits import MAX_ALL_DOTS, MAX_DEPTH, MAX_DOTS, MAX_KEY, MAX_TENSORS, refuse
from .rebuild import Array
from .unpickle import Placeholder


def plain_tree(path: str, content: Any, size: int) -> Dict[str, Any]:
    """Keep the tensors and the dictionaries that lead to them. A key of anything else leads to None.

    Each dictionary is in one place of the result, the one with the shortest path. The result so has an end, even if a
    dictionary of the file is inside itself.

    Args:
        path: The file, for errors.
        content: What was read from it: a dictionary, or a placeholder that is filled like one.
        size: Bytes of the file, or to which it unpacks.

    Raises:
        UnreadableError: There are more tensors, longer keys or larger tensors than any checkpoint has.
    """
    tree: Dict[str, Any] = {}
    queue = collections.deque([('', content, tree, 0)])
    seen = set()
    tensors, dots = 0, 0
    spend = _Budget(size).spend
    while queue:
        place, node, result, depth = queue.popleft()
        for key, value in (node.items if isinstance(node, Placeholder) else node).items():
            if isinstance(value, Array):
                value = value.tensor(spend)
            if isinstance(value, (dict, Placeholder)):
                inner = value.items if isinstance(value, Placeholder) else value
                if not inner or depth == MAX_DEPTH or id(inner) in seen:
                    value = None
                else:
                    seen.add(id(inner))
                    result[_checked(path, key)] = {}
                    queue.append((f'{place}/{key}'.lstrip('/'), inner, result[key], depth + 1))
                    continue
            if isinstance(value, torch.Tensor):
                tensors, dots = tensors + 1, dots + _checked(path, key).count('.')
                if tensors > MAX_TENSORS or dots > MAX_ALL_DOTS:
                    what = f'a file of more than {MAX_TENSORS} tensors, or {MAX_ALL_DOTS} dots in their keys'
                    raise refuse(path, what, 'Write those of the model alone.')
                if math.prod(value.shape) * value.element_size() > size:
                    raise refuse(
                        path,
                        f'a tensor {clip(f"{place}/{key}")} of shape {tuple(value.shape)} in a file of {size} bytes',
                        'Do not trust its source.',
                    )
                result[key] = value
            elif len(key) <= MAX_KEY:
                result[key] = None
    return tree


def _checked(path: str, key: str) -> str:
    """A key that is not longer than those of any checkpoint."""
    dots = key.count('.')
    if len(key) > MAX_KEY or dots > MAX_DOTS:
        what = f'a key of {len(key)} characters with {dots} dots ({clip(key, 60)})'
        raise refuse(path, what, f'Keys have at most {MAX_KEY} characters and {MAX_DOTS} dots: rename it.')
    return key


class _Budget:
    """Bytes that may still be copied."""

    def __init__(self, size: int) -> None:
        self.left = size

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise ValueError('arrays that repeat the bytes of the file')
