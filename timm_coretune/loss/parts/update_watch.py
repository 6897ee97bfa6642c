"""Notice that the optimizer does not have the parameters of the loss"""

import logging
import weakref
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ...distributed import process_index_and_count

_logger = logging.getLogger(__name__)

_NUM_UPDATES = 10  # a second optimizer, for the loss alone, may skip some of its first updates or begin later
_COMPARED = tuple(2**n for n in range(6, 20))  # numbers of steps without an update that counters show


def find_parameter(*outputs: torch.Tensor) -> Optional[torch.Tensor]:
    """The first parameter that is found on the way back from outputs of a network, None if there is no graph."""
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node: Any = nodes.pop(0)
        if isinstance(getattr(node, 'variable', None), nn.Parameter):
            return node.variable
        found = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(found)
        nodes.extend(found)
    return None


class UpdateWatch:
    """Warns once if the network is updated several times, and the parameters of the loss never.

    An update in place raises the version counter of a parameter, even if the learning rate is 0. Between accumulated
    batches, and if a GradScaler skips an update, no counter changes. Counters are read without waiting for the device.
    Fused optimizers raise none. If none changes, values are compared, after 64 steps that began with gradients from the
    steps before, and again after 128, 256 and so on. In a loop that clears the gradients there are no such steps.
    A parameter without gradient, such as one that is frozen, is not expected to change.
    """

    def __init__(self) -> None:
        self._network: Callable[[], Optional[torch.Tensor]] = lambda: None
        self._versions: Tuple[int, ...] = ()
        self._values: List[torch.Tensor] = []
        self._num_updates = self._num_steps = 0
        self._is_done = False

    def __reduce__(self) -> Tuple[Any, ...]:
        return UpdateWatch, ()  # a copy of a loss has a network of its own

    def see(self, loss: nn.Module, find_network: Callable[[], Optional[torch.Tensor]]) -> None:
        """Look at the counters. Call this in each step, before the loss is computed.

        Args:
            loss: The loss.
            find_network: Returns a parameter of the network, None if there is none. It is called when one is needed.
        """
        if self._is_done or not loss.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        own = [p for p in loss.parameters() if p.requires_grad]
        known = self._network()
        network = find_network() if own and known is None else known
        if not own or network is None:
            return
        versions = (network._version, *(p._version for p in own))
        watched = [network, min(own, key=torch.Tensor.numel)]
        if known is None or len(versions) != len(self._versions):
            self._network, self._versions = weakref.ref(network), versions
            self._values = [p.detach().clone() for p in watched]
        elif versions[1:] != self._versions[1:]:
            self._is_done = True
        elif any(p.grad is not None for p in own):
            if versions == self._versions:
                self._num_steps += 1
                self._is_done = self._num_steps in _COMPARED and self._only_network_differs(watched)
            else:
                self._versions = versions
                self._num_updates += 1
                self._is_done = self._num_updates == _NUM_UPDATES
            if self._is_done:
                _warn(loss)

    @torch.no_grad()
    def _only_network_differs(self, watched: Sequence[torch.Tensor]) -> bool:
        # in half precision, small updates are lost when weights are rounded
        if any(p.element_size() < 4 for p in watched):
            return False
        same_network, same_own = (torch.equal(p, before) for p, before in zip(watched, self._values, strict=True))
        return same_own and not same_network


def _warn(loss: nn.Module) -> None:
    if process_index_and_count()[0] == 0:
        _logger.warning(
            f'The optimizer updates the network and not the parameters of {type(loss).__name__}, although they have '
            'gradients. Give it [*model.parameters(), *criterion.parameters()], or with a task the parameters of '
            'task.get_trainable_module().'
        )
