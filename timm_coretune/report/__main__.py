"""Write the report of a run as one page of HTML

python -m timm_coretune.report RUN
"""

import argparse
import logging
import os
from typing import List, Optional

from timm.utils import setup_default_logging

from ..redaction import expand_home, redacted_output
from ..run_folder import REPORT_NAME
from .create import MAX_IMAGES, create_report


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'timm-coretune report', description='Write the report of a run as one page of HTML that loads nothing.'
    )
    add = parser.add_argument
    add('run', metavar='RUN', help='output folder of train.py')
    add('--output', metavar='FILE', help=f'file to write (default: {REPORT_NAME} in RUN)')
    add(
        '--max-images',
        type=int,
        default=MAX_IMAGES,
        metavar='N',
        help='held-out images, and training images, to look at (default: %(default)s)',
    )
    add('--device', help='device to compute on, such as cpu or cuda (default: a GPU if there is one)')
    return parser


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command."""
    setup_default_logging(default_level=logging.WARNING)
    parser = create_parser()
    args = parser.parse_args(arguments)
    try:
        path = create_report(expand_home(args.run), args.device, args.max_images, args.output)
    except (ValueError, ImportError, OSError) as e:
        parser.error(f'{e}')
    print(f'Report: {path} ({os.path.getsize(path) / 1e6:.1f} MB)')


if __name__ == '__main__':
    main()
