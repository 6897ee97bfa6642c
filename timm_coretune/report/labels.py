"""Names of classes as labels in pictures: not too long, and in a font that has their letters"""

import functools
import logging
from typing import Any, List, Sequence, Set, Tuple

from ..checks import shorten

_logger = logging.getLogger(__name__)

_LONGEST = 28  # characters of a label
_PLACEHOLDERS = ('last resort', 'lastresort')  # fonts whose glyphs say only that another font is needed


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST:
        return name
    end = _LONGEST // 3
    return f'{name[: _LONGEST - end - 1]}…{name[-end:]}'


def create_labels(names: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Labels for classes, and the families of fonts to draw them in.

    Long names are shortened, with their index in front if they are alike then. A name with letters that no installed
    font has becomes its index, which is logged.

    Args:
        names: Names of the classes by index.

    Returns:
        A label for each class, and values for `fontfamily`.
    """
    printable = [''.join(c if c.isprintable() else ' ' for c in name) for name in names]
    families, missing = _families_for(frozenset(''.join(printable)))
    without = [index for index, name in enumerate(printable) if missing & set(name)]
    if without:
        shown = shorten([f'{index} is {names[index]}' for index in without], 10)
        _logger.warning(
            f'No installed font has the letters of {len(without)} of {len(names)} class names, so pictures have the '
            f'numbers of these classes: {shown}. A font such as Noto Sans CJK in the system is found by itself.'
        )
    labels = [str(i) if i in set(without) else _shortened(name) for i, name in enumerate(printable)]
    alike = {label for label in labels if labels.count(label) > 1} if len(set(labels)) < len(labels) else set()
    labels = [f'{i}: {label}' if label in alike else label for i, label in enumerate(labels)]
    # matplotlib leaves labels that begin with an underscore out of legends
    return [f' {label}' if label.startswith('_') else label for label in labels], families


def _families_for(letters: frozenset) -> Tuple[List[str], Set[str]]:
    """Families of fonts that have these letters, the default one first, and the letters that none has."""
    from matplotlib import font_manager, rcParams

    families = list(rcParams['font.family'])
    missing = set(letters) - _covered(font_manager.findfont(font_manager.FontProperties()), letters)
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.style != 'normal', font.name)):
        if not missing:
            break
        if font.name.lower().lstrip('.').startswith(_PLACEHOLDERS):
            continue
        found = _covered(font.fname, frozenset(missing))
        if found:
            families.append(font.name)
            missing -= found
    return families, missing


@functools.lru_cache(maxsize=4096)
def _covered(path: str, letters: frozenset) -> frozenset:
    """Those of the letters that a font file has."""
    from matplotlib.ft2font import FT2Font

    try:
        font: Any = FT2Font(path)
        return frozenset(letter for letter in letters if font.get_char_index(ord(letter)))
    except (RuntimeError, OSError):  # fonts of bitmaps, such as emoji, and files that are gone
        return frozenset()
