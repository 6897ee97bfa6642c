"""Compares the palettes of masks: an index that has two colours is two classes"""

from typing import Any, Callable, Dict, List, Sequence, Set, Tuple

from PIL import Image
from tqdm import tqdm

from ...data.images import reason_of
from .folders import Source
from .masks import IGNORE_INDEX, ignored_value, load_mask

Color = Tuple[int, ...]


def compare_palettes(
    sources: Sequence[Source],
    reduce_zero_label: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> None:
    """Check that each palette index which masks use has the same colour in all of them.

    Only the headers of the files are read, unless palettes differ. Masks without a palette are passed over, and so are
    sources without `load_mask`: their masks come from one hand.

    Args:
        sources: Images and masks, of one split or several.
        reduce_zero_label: Whether the value 0 is ignored.
        ignore_index: Value of the pixels to ignore.

    Raises:
        ValueError: An index has two colours. The message has both, with a file each.
    """
    members: Dict[bytes, List[Tuple[Source, int]]] = {}
    places = [(source, index) for source in sources if hasattr(source, 'load_mask') for index in range(len(source))]
    for source, index in tqdm(places, 'Compare palettes', disable=None, leave=False, dynamic_ncols=True):
        palette = _read(source, index, _palette_of)
        if palette:
            members.setdefault(palette, []).append((source, index))
    ignored = {ignored_value(source, ignore_index) for source in sources} | ({0} if reduce_zero_label else set())
    colors: Dict[int, Tuple[Color, str]] = {}
    doubtful = _find_differences(list(members)) - ignored
    for palette, group in members.items():
        wanted = {index for index in doubtful if 3 * index < len(palette)}
        for source, number in group:
            if not wanted:
                break
            counts = _read(source, number, Image.Image.histogram)
            used = {index for index in wanted if counts and counts[index]}
            wanted -= used
            for index in sorted(used):
                color = tuple(palette[3 * index : 3 * index + 3])
                other, name = colors.setdefault(index, (color, source.name(number)))
                if other != color:
                    raise ValueError(
                        f'Expected masks whose palettes agree, but index {index} is {other} in {name} and {color} in '
                        f'{source.name(number)}. If the colours are the classes, list them with --mask-colors FILE; if '
                        'the indices are, whatever their colours, give --mask-colors index.'
                    )


def _read(source: Source, index: int, what: Callable[[Image.Image], Any]) -> Any:
    """Something about a mask, None if the file cannot be read: the data set refuses it with its name."""
    try:
        with load_mask(source, index) as mask:
            return what(mask)
    except Exception as e:
        reason_of(e)  # raises what says nothing about the file
        return None


def _palette_of(mask: Image.Image) -> bytes:
    """Red, green and blue of each index in turn, if possible without reading the pixels. Empty without a palette."""
    if mask.mode != 'P':
        return b''
    kind, data = mask.palette.getdata() if mask.palette is not None else ('', b'')
    return bytes(data) if kind == 'RGB' else bytes(mask.getpalette('RGB') or [])


def _find_differences(palettes: Sequence[bytes]) -> Set[int]:
    """Indices whose colour is not the same in all palettes that have them."""
    first: Dict[int, bytes] = {}
    different: Set[int] = set()
    for palette in palettes:
        for index in range(len(palette) // 3):
            color = palette[3 * index : 3 * index + 3]
            if first.setdefault(index, color) != color:
                different.add(index)
    return different
