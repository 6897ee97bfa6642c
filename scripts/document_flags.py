"""Write the tables of docs/flags.md from the settings of train.py and from docs/flags_notes.yaml

python scripts/document_flags.py
"""

import dataclasses
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Sequence

import yaml

from timm_coretune.train.cli.arguments import create_parser
from timm_coretune.train.cli.flags import default_of, names_of
from timm_coretune.train.cli.settings import OWN_SECTIONS, TUNING, Settings

DOCS = Path(__file__).parents[1] / 'docs'
BEGIN, END = '<!-- the tables from here on are written by scripts/document_flags.py -->\n', '<!-- end of the tables -->'


class Row(NamedTuple):
    """A flag: its names, default, help and section."""

    names: List[str]
    default: Any
    help: str
    section: str


def show_default(default: Any) -> str:
    """A default in a cell, nothing for none."""
    if isinstance(default, bool):
        return 'off'
    if isinstance(default, list):
        return ' '.join(f'{value:.4g}' if isinstance(value, float) else str(value) for value in default)
    return str(default) if default not in (None, '', {}) else ''


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ['---'] * len(header), *rows):
        yield f'| {" | ".join(cells)} |'
    yield ''


def write_group(title: str, summary: str, rows: List[Row], notes: Dict[str, Any]) -> Iterator[str]:
    """Heading, table of the flags, and table of those that differ from timm's."""
    yield from (f'## {title}', '', summary, '')
    flags, differing = [], []
    for row in rows:
        note = next((notes[name] for name in row.names if name in notes), None)
        names = ' '.join(f'`{name}`' for name in row.names)
        mark = ' *new*' if row.section in OWN_SECTIONS else ''
        more = f'; {note}' if isinstance(note, str) else ''
        flags.append([names + mark, show_default(row.default), row.help + more])
        if isinstance(note, dict):
            differing.append([names, note['in timm'], note['here']])
    yield from write_table(['flag', 'default', 'what it does'], flags)
    if differing:
        yield from write_table(['differs', 'in timm', 'here'], differing)


def write_tables() -> str:
    """The tables of all groups."""
    notes = yaml.safe_load((DOCS / 'flags_notes.yaml').read_text())
    actions = {action.dest: action for action in create_parser()._actions}
    rows = [
        Row(['-c', '--config'], None, str(actions['config'].help), ''),
        Row(['--preset'], None, str(actions['preset'].help), TUNING),
    ]
    lines = [*write_group('Where settings come from', 'Flags win over both.', rows, notes)]
    for group in dataclasses.fields(Settings):
        kind: Any = group.default_factory
        rows, section = [], ''
        for f in dataclasses.fields(kind):
            section = f.metadata['flag'].section or section
            rows.append(Row(names_of(f), default_of(f), f.metadata['flag'].help, section))
        lines += write_group(group.name.capitalize(), f'`settings.{group.name}`: {kind.__doc__}', rows, notes)
    return '\n'.join(lines)


def replace_tables(page: str) -> str:
    """The page with its tables written anew."""
    before, _, rest = page.partition(BEGIN)
    return f'{before}{BEGIN}\n{write_tables()}{END}{rest.partition(END)[2]}'


def main() -> None:
    path = DOCS / 'flags.md'
    path.write_text(replace_tables(path.read_text()))


if __name__ == '__main__':
    main()
