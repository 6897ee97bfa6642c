"""Take the pictures of a report that the docs show, in headless Chromium

python scripts/screenshot_report.py RUN/report.html --light docs/report_light.png --phone docs/report_phone.png

Needs selenium, and Chromium with its driver: `apt-get install chromium chromium-driver`.
"""

import argparse
import io
import shutil
from pathlib import Path
from typing import Any, Optional

from PIL import Image

DRIVER = 'chromedriver'


def open_browser(width: int, height: int, dark: bool = False) -> Any:
    """A headless Chromium whose page is this large and which prefers this scheme of colours.

    The size is that of the page as a device has it, which may be narrower than a window can be.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--hide-scrollbars'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which(DRIVER)))
    try:
        set_device(browser, width, height, dark)
    except BaseException:
        browser.quit()
        raise
    return browser


def set_device(browser: Any, width: int, height: int, dark: bool) -> None:
    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    scheme = [dict(name='prefers-color-scheme', value='dark' if dark else 'light')]
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=scheme))


def take(browser: Any, page: Path, target: Path, width: int, height: int, dark: bool, colors: Optional[int]) -> None:
    """Save the top of a page as PNG. Fewer colours make a smaller file."""
    set_device(browser, width, height, dark)
    browser.get(page.resolve().as_uri())
    with Image.open(io.BytesIO(browser.get_screenshot_as_png())) as image:
        image = image.convert('RGB')
    if colors is not None:
        image = image.quantize(colors, dither=Image.Dither.NONE)
    image.save(target, optimize=True)
    print(f'{target}: {image.width} x {image.height}, {target.stat().st_size / 1000:.0f} kB')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('page', type=Path, help='report.html of a run')
    parser.add_argument('--light', type=Path, help='picture of a desktop, 1280 pixels wide, light')
    parser.add_argument('--phone', type=Path, help='picture of a phone, 390 pixels wide, dark')
    parser.add_argument('--height', type=int, default=1400, help='pixels from the top (default: %(default)s)')
    parser.add_argument('--colors', type=int, help='number of colours (default: all)')
    args = parser.parse_args()
    browser = open_browser(1280, args.height)
    try:
        if args.light:
            take(browser, args.page, args.light, 1280, args.height, False, args.colors)
        if args.phone:
            take(browser, args.page, args.phone, 390, args.height, True, args.colors)
    finally:
        browser.quit()


if __name__ == '__main__':
    main()
