"""Push the best weights of a finished run to the Hugging Face Hub

python -m timm_coretune.hub push OUTPUT_FOLDER owner/name

Exit codes: 0 the run was pushed, 2 the command line is wrong, 3 the push failed (the run stays on disk).
"""

import argparse
import logging
import sys
from typing import List, Optional

from timm.utils import setup_default_logging

from ..redaction import expand_home, redacted_output
from .connection import NOT_PUSHED, HubError, quiet_requests
from .push import push_command, push_run


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('python -m timm_coretune.hub', description=(__doc__ or '').split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    push = commands.add_parser('push', help='push the best weights of a run with a model card')
    push.add_argument('folder', metavar='OUTPUT_FOLDER', help='output folder of a run of train.py')
    push.add_argument('repo_id', metavar='OWNER/NAME', help='repository on the Hub to push to, created if missing')
    push.add_argument(
        '--private', action='store_true', help='make the repository private; a push into a public one is refused'
    )
    push.add_argument(
        '--revision', metavar='REV', help='branch of the repository to push to, created if missing (default: main)'
    )
    push.add_argument(
        '--license', metavar='NAME', help='licence of the weights as the Hub calls it, such as apache-2.0'
    )
    return parser


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    parser = create_parser()
    args = parser.parse_args(arguments)
    args.folder = expand_home(args.folder)
    setup_default_logging(default_level=logging.INFO)
    quiet_requests()
    try:
        url = push_run(args.folder, args.repo_id, args.private, args.revision, license=args.license)
    except ValueError as e:
        parser.error(str(e))
    except Exception as e:
        reason = str(e) if isinstance(e, HubError) else f'{type(e).__name__}: {e}'
        command = push_command(args.folder, args.repo_id, args.private, args.revision, args.license)
        print(f'Not pushed: {reason}\nTry again with:\n{command}', file=sys.stderr)
        sys.exit(NOT_PUSHED)
    print(f'Pushed: {url}')


run = main  # the former name

if __name__ == '__main__':
    main()
