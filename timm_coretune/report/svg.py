"""Charts of matplotlib as SVG inside a page: text stays text, and colours are those of the page, light or dark"""

import io
import re
from typing import Any, Tuple

from .html import text
from .plots import create_figure

NUM_COLORS = 10  # of lines and points, --c0 to --c9 in the style sheet
_INK, _FAINT = '#010101', '#020202'  # stand for the colours of text and of grid lines
SOFT = '#050505'  # of lines that are no data


def color(index: int) -> str:
    """The colour of this number, in matplotlib's notation. `to_svg` replaces it by that of the page."""
    return f'#0301{index:02x}'


MUTED = '#040404'  # of points that belong to no class with a colour
_PAGE_COLORS = {_INK: 'currentColor', _FAINT: 'var(--line)', SOFT: 'var(--soft)', MUTED: 'var(--muted)'}


def create_chart(width: float = 4.6, height: float = 2.7) -> Tuple[Any, Any]:
    """A figure of one chart, of this size in inches, and its axes."""
    figure = create_figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set_facecolor('none')
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    for side in ('bottom', 'left'):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(color=_FAINT, labelcolor=_INK, labelsize=9)
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def to_svg(figure: Any, description: str, key: str) -> str:
    """A figure as SVG for a page of HTML.

    Args:
        figure: The figure.
        description: What it shows, for readers who do not see it.
        key: A word that no other chart of the page has. Names inside the SVG, which the page shares, are made of it.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': key}):
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index('<svg') :]
    drawn = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->', '', drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', '<g', drawn)  # the same in all charts
    # the font is that of the page; matplotlib 3.7 writes `font: 10px 'DejaVu Sans', ...`, later ones font-family
    drawn = re.sub(r'font: ([\d.]+px) [^;"]*', r'font-size: \1', drawn)
    drawn = re.sub(r'font-family: [^;"]*;? ?', '', drawn)
    # a tenth of a point is enough for coordinates; the texts between the tags stay
    drawn = re.sub(r'<[^>]*>', lambda tag: re.sub(r'(\d\.\d)\d+', r'\1', tag[0]), drawn)
    view = re.search(r'viewBox="[^"]*"', drawn)
    assert view is not None
    drawn = drawn[drawn.index('>') + 1 :]
    for stand_in, value in _PAGE_COLORS.items():
        drawn = drawn.replace(stand_in, value)
    drawn = re.sub(r'#0301([0-9a-f]{2})', lambda match: f'var(--c{int(match[1], 16)})', drawn)
    return f'<svg {view[0]} role="img" aria-label="{text(description)}">{drawn}'


def chart(svg: str, title: str, below: str = '') -> str:
    """A chart with its title above it. Both and what is below, such as a legend, are HTML already."""
    return f'<figure class="chart"><figcaption>{title}</figcaption>{svg}{below}</figure>'
