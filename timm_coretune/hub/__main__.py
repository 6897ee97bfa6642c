"""Push the best weights of a run that is over to the Hub

python -m timm_coretune.hub push OUTPUT_FOLDER owner/name

Exit codes: 0 pushed, 3 not pushed (what there is stays on disk), 2 the command line is wrong.
"""

import argparse
import logging
import sys
from typing import List, Optional

from timm.utils import setup_default_logging

from .push import push_command, push_run
from .upload import NOT_PUSHED, HubError, quiet_requests


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('python -m timm_coretune.hub', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    push = commands.add_parser('push', help='push a run')
    push.add_argument('folder', metavar='OUTPUT_FOLDER', help='folder of the run')
    push.add_argument('repo_id', metavar='OWNER/NAME', help='repository, made if need be')
    push.add_argument('--private', action='store_true', help='make the repository private')
    push.add_argument('--revision', metavar='REV', help='branch, made if need be (default: main)')
    push.add_argument('--license', metavar='NAME', help="licence of the weights by the Hub's name, such as apache-2.0")
    return parser


def run(arguments: Optional[List[str]] = None) -> None:
    parser = create_parser()
    args = parser.parse_args(arguments)
    setup_default_logging(default_level=logging.INFO)
    quiet_requests()
    try:
        url = push_run(args.folder, args.repo_id, args.private, args.revision, license=args.license)
    except ValueError as e:
        parser.error(str(e))
    except HubError as e:
        command = push_command(args.folder, args.repo_id, args.private, args.revision, args.license)
        print(f'Not pushed: {e}\nTry again with:\n{command}', file=sys.stderr)
        sys.exit(NOT_PUSHED)
    print(f'Pushed: {url}')


if __name__ == '__main__':
    run()
