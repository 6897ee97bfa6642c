"""Average the weights of several models of one architecture

Papers: `Robust fine-tuning of zero-shot models`
    - Mitchell Wortsman et al., CVPR 2022, https://arxiv.org/abs/2109.01903
`Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time`
    - Mitchell Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482
"""

import math
import os
from typing import Dict, Iterator, Mapping, Optional, Sequence, Union

import torch
from safetensors import SafetensorError, safe_open

from ..checks import shorten

_TOLERANCE = 1e-6  # by which the sum of the weights may differ from 1


class StoredState(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file by name. Each is read when it is asked for, so that few are in memory.

    Args:
        path: The file.

    Raises:
        ValueError: The file is no safetensors file.
    """

    def __init__(self, path: Union[str, os.PathLike]):
        self.path = os.fspath(path)
        try:
            self._file = safe_open(self.path, framework='pt')
        except (SafetensorError, OSError) as e:
            raise ValueError(f'Expected weights as safetensors in {self.path!r}: {e}.') from e
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check(states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]) -> None:
    if not states or len(weights) != len(states):
        raise ValueError(f'Expected a weight for each of one or more states, got {len(weights)} for {len(states)}.')
    if not all(math.isfinite(w) and 0 <= w <= 1 for w in weights) or abs(math.fsum(weights) - 1) > _TOLERANCE:
        raise ValueError(f'Expected weights of 0 to 1 that sum to 1, got {list(weights)}. Divide them by their sum.')
    for number, state in enumerate(states[1:], 1):
        different = sorted(set(state) ^ set(states[0]))
        if different:
            raise ValueError(
                f'Expected the same tensors in all states, those of state 0 and of state {number} differ in '
                f'{shorten(different)}. Average models of the same architecture.'
            )


def _average(name: str, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    first = tensors[0]
    for number, tensor in enumerate(tensors[1:], 1):
        if tensor.shape != first.shape:
            raise ValueError(
                f'Expected the same shape of {name} in all states, got {tuple(first.shape)} and {tuple(tensor.shape)} '
                f'in state {number}. Average models of the same architecture, classes and image size.'
            )
    used = [(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True) if weight > 0]
    # a counter has no mean; and what is one or the same stays bit for bit as it is
    if not first.is_floating_point() or all(torch.equal(tensor, used[0][1]) for _, tensor in used[1:]):
        return max(used, key=lambda pair: pair[0])[1].to(first.dtype, copy=True)
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = torch.zeros(first.shape, dtype=wide, device=first.device)
    for weight, tensor in used:
        total.add_(tensor.to(first.device, wide), alpha=weight)
    return total.to(first.dtype)


def average_weights(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Optional[Sequence[float]] = None
) -> Dict[str, torch.Tensor]:
    """Average the weights of models: for each tensor the sum of `weight * tensor` over the states.

    Sums are in float32, and in float64 for tensors of that dtype. The result has the dtypes of the first state. Tensors
    that hold no floating-point numbers, such as the step counters of BatchNorm, are those of the state with the
    greatest weight. A state of weight 0 has no part, whatever it holds. A state of weight 1, and tensors that are the
    same in all states, come back bit for bit.

    The averaged statistics of BatchNorm are not those of the averaged network: compute them anew with
    `torch.optim.swa_utils.update_bn`.

    Args:
        states: State dicts of models of the same architecture, or `StoredState`s, which read one tensor at a time.
        weights: Weight of each state, from 0 to 1, with a sum of 1. When None all are equal.

    Returns:
        The averaged state dict. Its tensors share no memory with those of the states.

    Raises:
        ValueError: The weights do not sum to 1, or the states differ in their tensors or shapes.

    Examples:

        ```python
        states = [load_file(path) for path in ('a.safetensors', 'b.safetensors')]
        model.load_state_dict(average_weights(states))
        ```
    """
    shares = [1 / len(states)] * len(states) if weights is None and states else list(weights or ())
    _check(states, shares)
    with torch.no_grad():
        return {name: _average(name, [state[name] for state in states], shares) for name in states[0]}
