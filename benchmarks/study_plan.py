"""The plan of a study: which runs of train.py a YAML file of data, networks, labels and arms asks for"""

import hashlib
import shlex
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import yaml

MOST_EXTENSIONS = 2  # of the learning rates of an arm, whose best is the first or the last of them
# scores by the kind of study, the one that chooses first: column of the results and title
SCORES: Dict[str, Dict[str, str]] = {
    'images': {'top1': 'top-1', 'class_mean': 'class mean'},
    'pixels': {'miou': 'mIoU', 'mpa': 'MPA', 'fwiou': 'FWIoU', 'pa': 'pixel accuracy'},
}
_AXES = ('data', 'network', 'labels', 'arm')
_KEYS = {'kind', 'flags', 'lrs', 'baseline', 'tune', 'test', 'networks', 'data', 'arms'}


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
    key = {name: getattr(cell, name) for name in _AXES}
    key.update(lr=f'{lr:g}', weight='' if weight is None else f'{weight:g}', seed=str(seed), stage=stage)
    key['flags'] = hashlib.sha256('\0'.join(flags).encode()).hexdigest()[:10]
    return Run(key, flags)


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


def _entry(value: Any, where: str, allowed: Sequence[str]) -> Dict[str, Any]:
    """An entry of the file: flags alone, or a mapping that may have them."""
    entry = {'flags': value or ''} if value is None or isinstance(value, str) else value
    unknown = [key for key in entry if key not in allowed] if isinstance(entry, dict) else ['no mapping']
    if unknown:
        raise ValueError(f'Expected flags or {", ".join(allowed)} in {where}, got {", ".join(map(str, unknown))}.')
    return {**entry, 'flags': tuple(shlex.split(entry.get('flags') or ''))}


def _stage(plan: Mapping[str, Any], data: Mapping[str, Any], name: str) -> Stage:
    stage = _entry({**plan[name], **data.get(name, {})}, name, ('flags', 'seeds'))
    return Stage(tuple(stage['seeds']), stage['flags'])


def _weights(arm: Mapping[str, Any], where: str) -> Tuple[str, Tuple[Optional[float], ...]]:
    weight = arm.get('weight')
    if weight is None:
        return '', (None,)
    if not isinstance(weight, dict) or set(weight) != {'flag', 'values'} or '{}' not in weight['flag']:
        raise ValueError(f'Expected weight as {{flag: "--FLAG {{}}", values: [...]}} in {where}, got {weight!r}.')
    return weight['flag'], tuple(map(float, weight['values']))


def read_study(path: str) -> Study:
    """Read the file of a study.

    Raises:
        ValueError: A part of it is missing or unknown.
    """
    with open(path, encoding='utf-8') as f:
        plan = yaml.safe_load(f)
    if not isinstance(plan, dict) or set(plan) != _KEYS or plan['kind'] not in SCORES:
        raise ValueError(f'Expected {", ".join(sorted(_KEYS))} in {path!r}, with kind {" or ".join(SCORES)}.')
    if plan['baseline'] not in plan['arms']:
        raise ValueError(f'Expected the baseline among the arms of {path!r}, got {plan["baseline"]!r}.')
    networks = {k: _entry(v, f'network {k}', ('flags', 'lrs', 'title')) for k, v in plan['networks'].items()}
    arms = {k: _entry(v, f'arm {k}', ('flags', 'weight', 'title')) for k, v in plan['arms'].items()}
    datasets = {
        k: _entry(v, f'data {k}', ('flags', 'networks', 'labels', 'tune', 'test', 'title'))
        for k, v in plan['data'].items()
    }
    cells = []
    for name, data in datasets.items():
        missing = [network for network in data['networks'] if network not in networks]
        if missing:
            raise ValueError(f'Expected the networks of data {name} among {", ".join(networks)}, got {missing[0]!r}.')
        for network in data['networks']:
            lrs = tuple(sorted(map(float, networks[network].get('lrs', plan['lrs']))))
            if len(lrs) < 3:
                raise ValueError(f'Expected three learning rates or more for network {network}, got {lrs}.')
            for labels, flags_of_labels in data['labels'].items():
                for arm, entry in arms.items():
                    flags = (
                        *shlex.split(plan['flags']),
                        *data['flags'],
                        *networks[network]['flags'],
                        *shlex.split(flags_of_labels or ''),
                        *entry['flags'],
                    )
                    weight_flag, weights = _weights(entry, f'arm {arm}')
                    stages = [_stage(plan, data, stage) for stage in ('tune', 'test')]
                    cells.append(Cell(name, network, labels, arm, flags, lrs, weights, weight_flag, *stages))
    entries = {**datasets, **networks, **arms}
    return Study(plan['kind'], plan['baseline'], cells, {k: v.get('title', k) for k, v in entries.items()})


def select(cells: Sequence[Cell], wanted: Sequence[str]) -> List[Cell]:
    """The cells that were asked for, by words such as data=letters,arm=scl. Names of one axis are alternatives.

    Raises:
        ValueError: No cell has a name that was asked for.
    """
    names: Dict[str, List[str]] = {}
    for word in ','.join(wanted).split(',') if wanted else []:
        axis, _, name = word.partition('=')
        known = sorted({getattr(cell, axis) for cell in cells}) if axis in _AXES else []
        if name not in known:
            raise ValueError(
                f'Expected {" or ".join(f"{axis}=NAME" for axis in _AXES)} with a name of the study, got {word!r}'
                + (f'. There is {", ".join(known)}.' if known else '.')
            )
        names.setdefault(axis, []).append(name)
    return [cell for cell in cells if all(getattr(cell, axis) in chosen for axis, chosen in names.items())]
