"""Turns the fields of dataclasses into flags of the command line"""

import argparse
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from typing import (
    Any,
    Dict,
    List,
    Literal,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from timm.utils import ParseKwargs


@dataclass(frozen=True)
class Flag:
    """How a field appears on the command line.

    Attributes:
        help: What the flag does. It must be clear without the help of other flags.
        metavar: Name of the value in the help. When None, it follows from the type: N, X or NAME.
        names: Further names of the flag, such as -b.
        nargs: Number of values, if it is fixed.
        const: Value if the flag is given without one.
        section: Title of the section in the help that starts with this field.
        choices: The values that there are, if the type does not list them.
    """

    help: str
    metavar: Optional[str] = None
    names: Tuple[str, ...] = ()
    nargs: Optional[int] = None
    const: Optional[str] = None
    section: Optional[str] = None
    choices: Tuple[str, ...] = ()


def flag(default: Any, help: str, metavar: Optional[str] = None, **kwargs: Any) -> Any:
    """A field of a dataclass that is also a flag. Name and type of the flag are those of the field."""
    metadata = {'flag': Flag(help, metavar, **kwargs)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(f: 'dataclasses.Field[Any]') -> Any:
    """Default of a field. A list or dictionary is a new copy in each call."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _kind_of(annotation: Any) -> Dict[str, Any]:
    """Arguments of argparse for a field with this annotation: type, choices, nargs or action."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Union:  # Optional
        return _kind_of(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return dict(choices=parts)
    if origin is list:
        return {**_kind_of(parts[0]), 'nargs': '+'}
    if origin is dict:
        return dict(nargs='*', action=ParseKwargs, metavar='K=V')
    if annotation is bool:
        return dict(action='store_true')
    return (
        dict(metavar='NAME') if annotation is str else dict(type=annotation, metavar='N' if annotation is int else 'X')
    )


class Number(NamedTuple):
    """A field that is a number, int or float, or several."""

    type: type
    several: bool


def numbers_of(groups: Sequence[type]) -> Dict[str, Number]:
    """All fields of these dataclasses that are numbers, by name."""
    numbers = {}
    for group in groups:
        hints = get_type_hints(group)
        for f in dataclasses.fields(group):
            kind = _kind_of(hints[f.name])
            if kind.get('type') in (int, float):
                numbers[f.name] = Number(kind['type'], 'nargs' in kind)
    return numbers


def describe(f: 'dataclasses.Field[Any]') -> str:
    """The help of a field, with its default, unless that is empty or already in the text."""
    text, default = f.metadata['flag'].help, default_of(f)
    if default in (None, '', [], {}) or default is False or '(default: ' in text:
        return text
    shown = ' '.join(map(str, default)) if isinstance(default, list) else str(default)
    return f'{text} (default: {shown})'


def names_of(f: 'dataclasses.Field[Any]') -> List[str]:
    """The names of a flag, short ones first."""
    given = f.metadata['flag'].names
    short = [name for name in given if not name.startswith('--')]
    return [*short, f'--{f.name.replace("_", "-")}', *(name for name in given if name not in short)]


def add_flags(parser: argparse.ArgumentParser, groups: Sequence[type]) -> None:
    """Add every field of these dataclasses to a parser as a flag, below the title of its section."""
    sections: Dict[Optional[str], Any] = {group.title: group for group in parser._action_groups}
    for group in groups:
        hints, current = get_type_hints(group), None
        for f in dataclasses.fields(group):
            options: Flag = f.metadata['flag']
            current = options.section or current
            kind = _kind_of(hints[f.name])
            if options.nargs is not None:
                kind['nargs'] = options.nargs
            if options.const is not None:
                kind.update(nargs='?', const=options.const)
            if options.choices:
                kind = dict(choices=options.choices)
            if options.metavar is not None:
                kind['metavar'] = options.metavar
            if current not in sections:
                sections[current] = parser.add_argument_group(current)
            sections[current].add_argument(
                *names_of(f),
                dest=f.name,
                default=default_of(f),
                help=describe(f).replace('%', '%%'),
                **kind,
            )


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint that gives the known name most similar to an unknown one, empty if none is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f' (nearest: {near[0]})' if near else ''


class _OneLineEach(argparse.HelpFormatter):
    """Prints a flag and its help on one line unless stdout is a terminal, so that grep finds both."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=60, width=None if sys.stdout.isatty() else 240)


class Parser(argparse.ArgumentParser):
    """A parser that answers an unknown flag with the most similar known one, and an error in one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_OneLineEach, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            hint = nearest(unknown[0].partition('=')[0], known)
            self.error(f'unrecognized arguments: {" ".join(unknown)}{hint}')
        return namespace

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line. All processes of a run read the same words, so the first says it for all."""
        is_first = os.environ.get('RANK', '0') == '0'
        self.exit(2, f'{self.prog}: error: {message}\n' if is_first else None)
