"""Averages weights in several ways and keeps those with the best validation"""

import logging
from collections import ChainMap
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, cast

import torch

from ..evaluation.scores import SCORES, describe_value, for_ranking, is_better
from .start import Start
from .validation import Validation, has_batch_norm
from .weights import average_weights

_logger = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]


class Row(NamedTuple):
    """A row of the table of all that was tried.

    Attributes:
        name: What the weights are.
        scores: Their scores on the validation images.
        batch_norm: Whether the statistics of BatchNorm were computed anew.
    """

    name: str
    scores: Dict[str, float]
    batch_norm: bool


class Chooser:
    """Validates averages of weights, and remembers the best.

    Args:
        validation: The validation of the run.
        num_images: Training images for the statistics of BatchNorm, 0 to average the statistics too.
    """

    def __init__(self, validation: Validation, num_images: int):
        self.validation = validation
        self.num_images = num_images if has_batch_norm(validation.model) else 0
        self.rows: List[Row] = []
        self.best: Optional[int] = None
        self.state: Dict[str, torch.Tensor] = {}

    def score(self, name: str, states: Sequence[State], weights: Sequence[float]) -> float:
        """Validate an average and add its row to the table. Returns the score that selects.

        One state alone keeps its statistics of BatchNorm, since those are right.
        """
        averages = sum(weight > 0 for weight in weights) > 1
        scores = self.validation(average_weights(states, weights), self.num_images if averages else 0)
        self.rows.append(Row(name, scores, bool(self.num_images and averages)))
        value = scores[self.validation.metric]
        _logger.info(f'{name}: {describe_value(self.validation.metric, value)}')
        return value

    def keep(self) -> None:
        """Take the weights that were validated last."""
        self.best = len(self.rows) - 1
        self.state = {k: v.detach().cpu().clone() for k, v in self.validation.model.state_dict().items()}

    def keep_if_better(self, value: float) -> None:
        """Take the weights that were validated last if they are the best so far."""
        before = None if self.best is None else self.rows[self.best].scores[self.validation.metric]
        if is_better(self.validation.metric, value, before):
            self.keep()


def sweep(chooser: Chooser, tuned: State, start: Start, alphas: Sequence[float]) -> str:
    """WiSE-FT: keep the best of the interpolations from the start (alpha 0) to the tuned weights (alpha 1).

    Returns:
        What was kept, in words.
    """
    unknown = sorted(start.state.keys() - tuned.keys())
    if unknown:
        raise ValueError(f'Expected a start with the tensors of the run, the run lacks {unknown[:5]}.')
    origin = ChainMap(cast(Any, start.state), cast(Any, tuned))  # a new head is that of the tuned weights
    for alpha in alphas:
        chooser.keep_if_better(chooser.score(f'alpha {alpha:g}', [tuned, origin], [alpha, 1 - alpha]))
    alpha = alphas[cast(int, chooser.best)]
    head = 'the head is the tuned one' if start.new else 'the head is interpolated too'
    how = f', alpha chosen by {chooser.validation.metric} on the validation images' if len(alphas) > 1 else ''
    return f'{alpha:g} x the tuned weights + {1 - alpha:g} x {start.name} (WiSE-FT{how}; {head})'


def uniform_soup(chooser: Chooser, states: Sequence[State], names: Sequence[str]) -> str:
    """Keep the mean of several runs, whatever the validation says of it."""
    for index, name in enumerate(names):
        chooser.score(name, [states[index]], [1.0])
    chooser.score('uniform soup', states, [1 / len(states)] * len(states))
    chooser.keep()
    return f'the mean of the weights of {", ".join(names)} (uniform soup, whatever the validation says of it)'


def greedy_soup(chooser: Chooser, states: Sequence[State], names: Sequence[str]) -> str:
    """Add runs to a mean, from the best to the worst. One that makes the validation worse is left out again."""
    metric = chooser.validation.metric
    alone: List[float] = []
    for index, name in enumerate(names):
        alone.append(chooser.score(name, [states[index]], [1.0]))
        chooser.keep_if_better(alone[-1])
    best_first = SCORES[metric].higher_is_better
    order = sorted(range(len(names)), key=lambda index: for_ranking(metric, alone[index]), reverse=best_first)
    taken, value = order[:1], alone[order[0]]
    for index in order[1:]:
        tried = [*taken, index]
        soup = 'soup of ' + ', '.join(names[i] for i in tried)
        found = chooser.score(soup, [states[i] for i in tried], [1 / len(tried)] * len(tried))
        if not is_better(metric, value, found):
            taken, value = tried, found
            chooser.keep()
    how = f'chosen by {metric} on the validation images'
    if len(taken) == 1:
        return (
            f'the weights of {names[taken[0]]} alone: no mean with another run validates as well (greedy soup, {how})'
        )
    return f'the mean of the weights of {", ".join(names[i] for i in taken)} (greedy soup, {how})'
