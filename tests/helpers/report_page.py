"""A page of a report as a reader sees it: texts by section, tables, pictures"""

import re
from html.parser import HTMLParser

# names of classes that must not become a part of the page
HOSTILE = ['<script>alert("1")</script>', 'a & b' + 100 * 'w', '"\' onload="x"', 'עברית\u202e']
VOID = {'meta', 'link', 'img', 'br'}


class Page(HTMLParser):
    """Parses a page. An element that is not closed in order is an error.

    Attributes:
        elements: Pairs of a tag and its attributes, in their order.
        sections: Text of each section by its anchor.
        tables: Rows of cells of each table, by its class.
        images: Attributes of the pictures.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.sections, self.tables, self.images = [], {}, {}, []
        self.open, self.section, self.rows = [], 'top', []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == 'section':
            self.section = attributes['id']
        if tag == 'table':
            self.rows = self.tables.setdefault(attributes['class'], [])
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')
        if tag == 'img':
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())
        if tag == 'section':
            self.section = 'bottom'

    def handle_data(self, data):
        if 'style' in self.open or not data.strip():
            return
        self.sections[self.section] = self.sections.get(self.section, '') + ' ' + data.strip()
        if {'td', 'th'} & set(self.open):
            self.rows[-1][-1] += data


def number_in(cell):
    """The number at the start of a cell, NaN for a dash."""
    cell = cell.replace('\u202f', '').replace('−', '-').strip()
    return float('nan') if cell.startswith('–') else float(re.match(r'[+-]?[\d.]+', cell)[0])
