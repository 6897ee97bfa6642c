"""Reads the file of a study: data x network x labels x arm"""

import shlex
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import yaml

from .plan import AXES, SCORES, Cell, Stage, Study

_KEYS = {'kind', 'flags', 'lrs', 'baseline', 'tune', 'test', 'networks', 'data', 'arms'}


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
        known = sorted({getattr(cell, axis) for cell in cells}) if axis in AXES else []
        if name not in known:
            raise ValueError(
                f'Expected {" or ".join(f"{axis}=NAME" for axis in AXES)} with a name of the study, got {word!r}'
                + (f'. There is {", ".join(known)}.' if known else '.')
            )
        names.setdefault(axis, []).append(name)
    return [cell for cell in cells if all(getattr(cell, axis) in chosen for axis, chosen in names.items())]
