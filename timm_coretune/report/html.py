"""Pieces of a page of HTML. All text that comes from a run goes through `text` or `name`"""

import base64
import html
import io
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

from PIL import Image

from ..checks import clip
from ..redaction import redact

_SIDE = 112  # pixels of the longer side of an embedded picture
_SMALL = 64  # up to this side a picture is embedded without loss


def text(value: object) -> str:
    """A text of a run as HTML: escaped, in one line, without secrets, cut if it is very long."""
    return html.escape(clip(redact(str(value)), 400))


def name(value: object) -> str:
    """A name, such as that of a class, as HTML. It may be written from right to left."""
    return f'<bdi>{text(value)}</bdi>'


def number(value: float, digits: int = 1) -> str:
    """A number with a thin gap between thousands, or a dash for NaN."""
    if math.isnan(value):
        return '–'
    return f'{value:,.{digits}f}'.replace(',', '\u202f').replace('-', '−')


def section(anchor: str, title: str, *parts: str) -> str:
    """A section with a heading. Empty without parts."""
    body = '\n'.join(filter(None, parts))
    return f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>' if body else ''


def paragraph(*sentences: str) -> str:
    return f'<p>{" ".join(filter(None, sentences))}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = '', kind: str = '') -> str:
    """A table of cells that are HTML already. It scrolls by itself if it is wider than the page."""
    head = ''.join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = [
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    ]
    below = f'<caption>{caption}</caption>' if caption else ''
    body = '\n'.join(lines)
    return (
        f'<div class="scroll"><table class="{kind}">{below}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        '</table></div>'
    )


def legend(entries: Sequence[Tuple[int, str]]) -> str:
    """Names of the colours of a chart, by their numbers in the style sheet."""
    swatches = [f'<span><i style="background:var(--c{color})"></i>{label}</span>' for color, label in entries]
    return f'<div class="legend">{"".join(swatches)}</div>' if swatches else ''


class Picture(NamedTuple):
    """A picture that is embedded into the page.

    Attributes:
        uri: Its data URI.
        width: Its width in pixels.
        height: Its height in pixels.
    """

    uri: str
    width: int
    height: int

    def show(self, alt: str) -> str:
        """The picture as HTML. alt is its description, already escaped."""
        kind = ' class="small"' if max(self.width, self.height) <= _SMALL else ''
        return f'<img{kind} src="{self.uri}" width="{self.width}" height="{self.height}" alt="{alt}">'


def embed(image: Image.Image, side: Optional[int] = _SIDE) -> Picture:
    """Embed an image, scaled down to this longer side: small ones as PNG, others as JPEG."""
    image = image.convert('L' if image.mode in ('1', 'L') else 'RGB')
    if side is not None:
        image.thumbnail((side, side))
    kind, options = ('PNG', dict(optimize=True)) if max(image.size) <= _SMALL else ('JPEG', dict(quality=85))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Picture(data_uri(file.getvalue(), kind.lower()), *image.size)


def data_uri(content: bytes, kind: str) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def listed(items: Sequence[str], kind: str) -> str:
    """A list of items that are HTML already."""
    lines: List[str] = [f'<li>{item}</li>' for item in items]
    return f'<ul class="{kind}">\n{"".join(lines)}\n</ul>' if lines else ''
