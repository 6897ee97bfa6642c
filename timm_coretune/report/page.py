"""The page around all sections: style, heading, and the links to the sections"""

import re
from importlib import resources
from typing import Sequence

from .html import text

# a browser that obeys this sends no request at all
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def create_page(title: str, subtitle: str, top: str, sections: Sequence[str], foot: str) -> str:
    """A whole page of HTML, which opens from the disk and loads nothing.

    Args:
        title: Title of the page.
        subtitle: Line below the title, as HTML.
        top: What comes before the sections, as HTML.
        sections: The sections, as HTML. Empty ones are left out.
        foot: Last line of the page, as HTML.
    """
    sections = [part for part in sections if part]
    found = [re.match(r'<section id="([a-z]+)">\n<h2>(.*?)</h2>', part) for part in sections]
    links = ''.join(f'<a href="#{match[1]}">{match[2]}</a>' for match in found if match)
    style = (resources.files('timm_coretune') / 'assets' / 'report.css').read_text(encoding='utf-8')
    body = '\n'.join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="subtitle">{subtitle}</p>
{top}
<nav>{links}</nav>
</header>
<main>
{body}
</main>
<footer>{foot}</footer>
</body>
</html>
"""
