"""Train from a command line"""

import os
import sys
from typing import List, Optional

from ..redaction import redacted_output
from .cli.arguments import parse_args
from .cli.errors import DivergedError, sentence_of


@redacted_output()
def main(argv: Optional[List[str]] = None) -> None:
    """Entry point of train.py and `python -m timm_coretune.train`. What the user can mend ends in one line.

    Raises:
        SystemExit: With status 2 if files or settings cannot be used, with 1 if training diverged, with 143 if SIGTERM,
            SIGUSR1 or --time-limit stopped the run.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parsed = parse_args(argv)
        from .session import run  # all that trains, which --help and a mistyped flag do not wait for

        run(parsed, argv)
    except Exception as e:
        sentence = sentence_of(e)
        if sentence is None:
            raise
        rank = os.environ.get('RANK', '0')
        print(f'train.py: error: {sentence}{"" if rank == "0" else f" (process {rank})"}', file=sys.stderr)
        sys.exit(1 if isinstance(e, DivergedError) else 2)


if __name__ == '__main__':
    main()
