"""Files that are there whole or not at all, whatever stops the program or the machine

A file is written beside its place, pushed to the disk, and only then renamed. A rename replaces the old file in one
step. The rename itself is on the disk once the folder is. See https://lwn.net/Articles/457667/ for why both are needed.
"""

import contextlib
import os
from typing import Iterator, Union

TEMPORARY_SUFFIX = '.tmp'


def _push_to_disk(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(temporary: Union[str, os.PathLike], path: Union[str, os.PathLike]) -> None:
    """Put a finished file in the place of another, or of none.

    Args:
        temporary: The finished file, on the same file system as path. It is gone afterwards.
        path: Where it belongs.
    """
    _push_to_disk(os.fspath(temporary), os.O_RDWR)
    os.replace(temporary, path)
    if os.name == 'posix':  # Windows opens no folders, and its rename is on the disk
        _push_to_disk(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)


@contextlib.contextmanager
def write_whole(path: Union[str, os.PathLike]) -> Iterator[str]:
    """Give a temporary path to write to; what is there at the end replaces path. An error leaves path as it was."""
    temporary = f'{os.fspath(path)}{TEMPORARY_SUFFIX}'
    try:
        yield temporary
        move_into_place(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(text: str, path: Union[str, os.PathLike]) -> None:
    """Write text as UTF-8, with line ends as they are."""
    with write_whole(path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as f:
        f.write(text)
