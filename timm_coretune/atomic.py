"""Write files atomically: after a crash a file is complete or unchanged, never half written

A file is written under a temporary name in the same folder and flushed to the disk. It gets the mode that any new file
has. Then it is renamed, which replaces the old file in one step. Then the folder is flushed to the disk as well, as
otherwise a power failure may undo the rename. See https://lwn.net/Articles/457667/.
"""

import contextlib
import os
import stat
from typing import Iterator, Union

TEMPORARY_SUFFIX = '.tmp'


def _push_to_disk(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(temporary: Union[str, os.PathLike], path: Union[str, os.PathLike]) -> None:
    """Rename a finished file, replacing any file that has the new name.

    Args:
        temporary: The finished file. It must be on the same file system as path.
        path: New name of the file.
    """
    _push_to_disk(os.fspath(temporary), os.O_RDWR)
    os.replace(temporary, path)
    if os.name == 'posix':  # Windows cannot open a folder to flush it
        _push_to_disk(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)


def _create(path: str) -> int:
    """Create an empty file in place of what is there, be it a link, and return the mode that new files have here."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def write_whole(path: Union[str, os.PathLike]) -> Iterator[str]:
    """Give a temporary path to write to, and rename it to path at the end. After an error path is unchanged."""
    temporary = f'{os.fspath(path)}{TEMPORARY_SUFFIX}'
    try:
        mode = _create(temporary)
        yield temporary
        if os.stat(temporary).st_mode != mode:  # safetensors makes its files readable for their owner only
            os.chmod(temporary, stat.S_IMODE(mode))
        move_into_place(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(text: str, path: Union[str, os.PathLike]) -> None:
    """Write a text file as UTF-8, with the line ends of the text on every system."""
    with write_whole(path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as f:
        f.write(text)
