"""Errors as the user of the command line sees them: one line for what the user can mend, a traceback for the rest"""

import contextlib
import re
from types import TracebackType
from typing import Iterator, Optional

import torch

_PACKAGE = __name__.partition('.')[0]
_LONGEST = 1000  # characters of what a library says
# what torch makes of an error in a process that loads data
_IN_A_WORKER = re.compile(
    r'Caught \w+ in .*?\nOriginal Traceback.*File "(?P<file>[^"\n]*)".*?\n[\w.]+: (?P<said>.*)', re.DOTALL
)


class DivergedError(ValueError):
    """A loss was not finite."""


def raised_in(traceback: Optional[TracebackType]) -> str:
    """Name of the library that raised an error, such as timm."""
    name = ''
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get('__name__', ''))
        traceback = traceback.tb_next
    return name.partition('.')[0]


def sentence_of(error: BaseException) -> Optional[str]:
    """The message of an error that the user can mend, in one line. None for an error of the program itself.

    The user can mend what this package refuses with a ValueError or an ImportError, what the system says about files,
    and a lack of memory.
    """
    said, is_ours = str(error), raised_in(error.__traceback__) == _PACKAGE
    from_worker = _IN_A_WORKER.fullmatch(said)
    if from_worker is not None:
        said, is_ours = from_worker['said'], f'/{_PACKAGE}/' in from_worker['file'].replace('\\', '/')
    if isinstance(error, torch.OutOfMemoryError):
        said = f'{said} A smaller --batch-size needs less; with more --grad-accum-steps an update stays as large.'
    elif not isinstance(error, OSError) and not (is_ours and isinstance(error, (ValueError, ImportError))):
        return None
    return ' '.join(said.split()) or None


@contextlib.contextmanager
def asked_by(flags: str) -> Iterator[None]:
    """Name the flags whose values a library refuses with an error of its own.

    Args:
        flags: The flags whose values are used meanwhile.

    Raises:
        ValueError: A library raised an error. The message begins with the flags.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError) as e:
        library = raised_in(e.__traceback__)
        if library == _PACKAGE:
            raise
        said = ' '.join(f'{type(e).__name__}: {e}'.split())[:_LONGEST].rstrip(': ')
        raise ValueError(f'{flags}: {library} refuses what was given. {said}') from e
