"""Lists of names in messages"""

from typing import Sequence

MAX_NAME = 150  # characters of one name; a foreign file may have keys of any length


def clip(text: str, count: int = MAX_NAME) -> str:
    """A text in one line, without control characters, and with its middle left out if it is long."""
    if len(text) > count:
        text = f'{text[: count // 2]} ... {text[-(count // 2) :]}'
    return ''.join(c if c.isprintable() else ' ' if c.isspace() else '?' for c in text)


def shorten(names: Sequence[str], count: int = 5) -> str:
    """The first names of a list, and the number of the others."""
    shown = ', '.join(clip(str(name)) for name in names[:count])
    return f'{shown} and {len(names) - count} more' if len(names) > count else shown
