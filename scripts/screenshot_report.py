r"""Take the pictures of a report that the docs show, in headless Chromium

python -m timm_coretune.train --coretune --report --metrics confusion,per-class --experiment fashion
python scripts/screenshot_report.py output/train/fashion/report.html --light docs/report_light.png \
    --phone docs/report_phone.png --features docs/report_features.png

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


def take(browser: Any, target: Path, selector: Optional[str] = None) -> None:
    """Save the top of the page that is open as PNG, or the first element that a selector finds."""
    if selector is None:
        taken = browser.get_screenshot_as_png()
    else:
        taken = browser.find_element('css selector', selector).screenshot_as_png
    with Image.open(io.BytesIO(taken)) as image:
        image = image.convert('RGB')
    image.save(target, optimize=True)
    print(f'{target}: {image.width} x {image.height}, {target.stat().st_size / 1000:.0f} kB')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('page', type=Path, help='report.html of a run')
    parser.add_argument('--light', type=Path, help='picture of a desktop, 1280 pixels wide, light')
    parser.add_argument('--phone', type=Path, help='picture of a phone, 390 pixels wide, dark')
    parser.add_argument('--features', type=Path, help='picture of the features before and after, light')
    parser.add_argument('--height', type=int, default=1400, help='pixels from the top (default: %(default)s)')
    args = parser.parse_args()
    browser = open_browser(1280, args.height)
    try:
        browser.get(args.page.resolve().as_uri())
        if args.light:
            take(browser, args.light)
        if args.features:
            take(browser, args.features, '#features .mapped')
        if args.phone:
            set_device(browser, 390, args.height, True)
            browser.get(args.page.resolve().as_uri())
            take(browser, args.phone)
    finally:
        browser.quit()


if __name__ == '__main__':
    main()
