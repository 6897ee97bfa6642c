"""Reads the YAML file of --config. Each value must be one that its flag takes on the command line"""

import argparse
from typing import Any, Callable, Dict

import yaml
from timm.utils import ParseKwargs

from ...redaction import expand_home, map_texts
from .flags import nearest

_NUMBERS: Dict[Any, str] = {int: 'a whole number', float: 'a number'}


class _Unfit(Exception):
    """A value that a flag does not take. The message is what was expected."""


def read_config(path: str, parser: argparse.ArgumentParser) -> Dict[str, Any]:
    """Read the settings in a file, by name. Ends with an error of the parser if one of them is none."""

    def refuse(what: str) -> None:
        parser.error(f'argument -c/--config: {what}')

    try:
        with open(path, encoding='utf-8') as f:
            config = yaml.safe_load(f)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        refuse(f'cannot read {path!r}: {e}')
    config = {} if config is None else config
    if not isinstance(config, dict):
        refuse(f'expected lines of NAME: VALUE in {path!r}, got {_shown(config)}')
    config = map_texts(config, expand_home)
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(map(str, set(config) - set(actions)))
    if unknown:
        refuse(
            f'{path!r} has keys that are no options: {", ".join(unknown)}' + nearest(unknown[0], list(actions))
        )  # fmt: skip
    for name, value in config.items():
        try:
            config[name] = _value_of(actions[name], value)
        except _Unfit as e:
            refuse(f'{name} in {path!r}: expected {e}, got {_shown(value)}')
    return config


def _shown(value: Any) -> str:
    return 'nothing' if value is None else repr(value)


def _value_of(action: argparse.Action, value: Any) -> Any:
    """The value of an option, as the command line would give it."""
    if value is None and action.default is None:
        return None
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise _Unfit('lines of NAME: VALUE below it')
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise _Unfit('true or false')
        return value
    if action.nargs == '+' or isinstance(action.nargs, int):
        number = action.nargs if isinstance(action.nargs, int) else None
        if not isinstance(value, list) or (number or len(value)) != len(value):
            raise _Unfit(f'a list of {number} values' if number else 'a list, such as [1, 2]')
        return [_single(action, item) for item in value]
    return _single(action, value)


def _single(action: argparse.Action, value: Any) -> Any:
    kind: Callable[[Any], Any] = action.type if callable(action.type) else str
    expected = _NUMBERS.get(kind, 'text')
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Unfit(expected)
    if isinstance(value, str) or kind is str:  # YAML 1.1 takes 3e-4 for text
        try:
            value = kind(value)
        except ValueError:
            raise _Unfit(expected) from None
    elif kind is int and isinstance(value, float):
        raise _Unfit(expected)
    if action.choices is not None and value not in action.choices:
        raise _Unfit(f'one of {", ".join(map(str, action.choices))}')
    return value
