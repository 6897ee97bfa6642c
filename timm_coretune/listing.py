"""Lists of names in messages"""

from typing import Sequence


def shorten(names: Sequence[str], count: int = 5) -> str:
    """The first names of a list, and the number of the others."""
    shown = ', '.join(map(str, names[:count]))
    return f'{shown} and {len(names) - count} more' if len(names) > count else shown
