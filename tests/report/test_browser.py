"""The report in headless Chromium: nothing is loaded, nothing is wider than the screen, and both schemes can be read"""

import json
import os
import shutil

import pytest
from screenshot_report import DRIVER, open_browser, set_device

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def browser():
    if not os.environ.get('CI'):
        pytest.importorskip('selenium', reason='selenium drives the browser')
        if shutil.which(DRIVER) is None:
            pytest.skip(f'no {DRIVER}: apt-get install chromium chromium-driver')
    browser = open_browser(1280, 900)
    yield browser
    browser.quit()


def requested(browser):
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    return [event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent']


WIDER = """
const wide = [...document.querySelectorAll('body *')].filter(
    e => !e.closest('.scroll') && e.getBoundingClientRect().right > window.innerWidth + 0.5);
return [document.documentElement.scrollWidth, window.innerWidth, wide.map(e => e.outerHTML.slice(0, 80))];
"""
COLOURS = """
const rgb = text => text.match(/\\d+/g).slice(0, 3).map(Number);
const of = (selector, name) => rgb(getComputedStyle(document.querySelector(selector))[name]);
return [of('section', 'backgroundColor'), of('section h2', 'color'), of('section p', 'color'),
    of('.chart svg text', 'fill'), matchMedia('(prefers-color-scheme: dark)').matches];
"""


def luminance(color):
    channels = [value / 255 for value in color]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Ratio of the WCAG: 4.5 is enough for text."""
    low, high = sorted(luminance(color) + 0.05 for color in (one, other))
    return high / low


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_a_page_is_quiet_fits_and_can_be_read(browser, run, width, dark):
    page = (run / 'report.html').as_uri()
    set_device(browser, width, 900, dark)
    requested(browser)
    browser.get(page)
    assert browser.get_log('browser') == []
    urls = requested(browser)
    assert page in urls
    assert [url for url in urls if url != page and not url.startswith('data:')] == []
    scroll_width, inner_width, wider = browser.execute_script(WIDER)
    assert inner_width == width
    assert scroll_width <= inner_width, wider
    assert wider == []
    card, *texts, is_dark = browser.execute_script(COLOURS)
    assert is_dark == dark
    assert (luminance(card) < 0.2) == dark
    assert [text for text in texts if contrast(card, text) < 4.5] == []
    assert browser.execute_script('return [...document.images].every(i => i.complete && i.naturalWidth > 0)')
    assert browser.execute_script('return document.querySelectorAll("script").length') == 0
