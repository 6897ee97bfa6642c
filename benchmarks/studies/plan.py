"""The plan of a study: cells, their runs of train.py, and how a tuning chooses a setting"""

import hashlib
import shlex
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

MOST_EXTENSIONS = 2  # of the learning rates of an arm, whose best is the first or the last of them
# scores by the kind of study, the one that chooses first: column of the results and title
SCORES: Dict[str, Dict[str, str]] = {
    'images': {'top1': 'top-1', 'class_mean': 'class mean'},
    'pixels': {'miou': 'mIoU', 'mpa': 'MPA', 'fwiou': 'FWIoU', 'pa': 'pixel accuracy'},
}
AXES = ('data', 'network', 'labels', 'arm')


class Stage(NamedTuple):
    """Seeds of a stage, and the flags that name what it validates on."""

    seeds: Tuple[int, ...]
    flags: Tuple[str, ...]


class Cell(NamedTuple):
    """All runs of an arm on some data.

    Attributes:
        data: Name of the data.
        network: Name of the network.
        labels: Name of the share of labels.
        arm: Name of the arm.
        flags: Flags of all runs, with places such as {data} for the folders of this machine.
        lrs: Learning rates to choose from, rising.
        weights: Strengths of the method to choose from. None for an arm that has no such flag.
        weight_flag: Flag of the strength, in which {} stands for its value.
        tune: The stage that chooses rate and strength.
        test: The stage that is reported.
    """

    data: str
    network: str
    labels: str
    arm: str
    flags: Tuple[str, ...]
    lrs: Tuple[float, ...]
    weights: Tuple[Optional[float], ...]
    weight_flag: str
    tune: Stage
    test: Stage


class Run(NamedTuple):
    """One run of train.py.

    Attributes:
        key: What identifies it, by the columns of the results.
        flags: Its flags, with places such as {data} for the folders of this machine.
    """

    key: Dict[str, str]
    flags: Tuple[str, ...]

    @property
    def name(self) -> str:
        shown = {k: v for k, v in self.key.items() if v and k != 'flags'}
        return ' '.join(f'{k} {v}' if k in ('lr', 'weight', 'seed') else v for k, v in shown.items())

    def words(self, places: Mapping[str, str]) -> List[str]:
        """The flags for this machine."""
        words = []
        for word in self.flags:
            for name, path in places.items():
                word = word.replace(f'{{{name}}}', path)
            words.append(word)
        return words


class Choice(NamedTuple):
    """What a tuning chose.

    Attributes:
        lr: The learning rate.
        weight: The strength of the method, None if it has none.
        lrs: All learning rates that were tried.
        is_inside: Whether a lower and a higher rate than the chosen one were tried.
    """

    lr: float
    weight: Optional[float]
    lrs: Tuple[float, ...]
    is_inside: bool


class Study(NamedTuple):
    """A study as its file describes it.

    Attributes:
        kind: 'images' or 'pixels'.
        baseline: Name of the arm that the others are compared with.
        cells: All cells, in the order of the file.
        titles: Titles of data, networks and arms by their names.
    """

    kind: str
    baseline: str
    cells: List[Cell]
    titles: Dict[str, str]


def make_run(cell: Cell, stage: str, lr: float, weight: Optional[float], seed: int) -> Run:
    """A run of a cell. Its key ends with a digest of the flags, so that a run with other flags is another one."""
    strength = [] if weight is None else shlex.split(cell.weight_flag.format(f'{weight:g}'))
    chosen = ['--lr', f'{lr:g}', *strength, '--seed', str(seed)]
    flags = (*cell.flags, *chosen, *getattr(cell, stage).flags)
    key = {name: getattr(cell, name) for name in AXES}
    key.update(lr=f'{lr:g}', weight='' if weight is None else f'{weight:g}', seed=str(seed), stage=stage)
    key['flags'] = hashlib.sha256('\0'.join(flags).encode()).hexdigest()[:10]
    return Run(key, flags)


def runs_to_tune(cell: Cell, lrs: Sequence[float]) -> List[Run]:
    """The runs that choose among these learning rates and all strengths."""
    settings = [(lr, weight) for lr in lrs for weight in cell.weights]
    return [make_run(cell, 'tune', *setting, seed) for setting in settings for seed in cell.tune.seeds]


def runs_to_test(cell: Cell, choice: Choice) -> Dict[int, Run]:
    """The runs with the chosen setting, by seed."""
    return {seed: make_run(cell, 'test', choice.lr, choice.weight, seed) for seed in cell.test.seeds}


def step_beyond(lrs: Sequence[float], upwards: bool) -> float:
    """The next learning rate of a geometric grid, in its own ratio, rounded to three digits."""
    end, neighbour = (lrs[-1], lrs[-2]) if upwards else (lrs[0], lrs[1])
    return float(f'{end * end / neighbour:.3g}')


def tune(cell: Cell, score: Callable[[Run], float]) -> Choice:
    """Choose the learning rate and the strength of an arm by the mean score of the seeds of its tuning.

    If the best rate is the first or the last one, a rate beyond it is tried with all strengths, at most
    MOST_EXTENSIONS times. Of equal scores the lowest rate and then the first strength wins.

    Args:
        cell: Has the rates and strengths.
        score: Trains a run, or looks up what it gave: the higher the better.
    """
    lrs = list(cell.lrs)
    means: Dict[Tuple[float, Optional[float]], float] = {}
    for extension in range(MOST_EXTENSIONS + 1):
        for lr in lrs:
            for weight in cell.weights:
                if (lr, weight) not in means:
                    values = [score(make_run(cell, 'tune', lr, weight, seed)) for seed in cell.tune.seeds]
                    means[lr, weight] = sum(values) / len(values)
        lr, weight = max(((lr, weight) for lr in lrs for weight in cell.weights), key=lambda s: means[s])
        is_inside = lrs[0] < lr < lrs[-1]
        if is_inside or extension == MOST_EXTENSIONS:
            break
        upwards = lr == lrs[-1]
        lrs.insert(len(lrs) if upwards else 0, step_beyond(lrs, upwards))
    return Choice(lr, weight, tuple(lrs), is_inside)
