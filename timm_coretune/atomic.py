"""Write files atomically: after a crash a file is complete or unchanged, never half written

A file is written under a temporary name in the same folder and flushed to the disk. It gets the mode that any new file
has. Then it is renamed, which replaces the old file in one step. Then the folder is flushed to the disk as well, as
otherwise a power failure may undo the rename. See https://lwn.net/Articles/457667/.

The temporary name is random, and its file must be new. A fixed name may be taken: by a file of the user, by another
process, or by a symbolic link that somebody left there so that another file is overwritten through it.
"""

import contextlib
import os
import re
import secrets
import stat
from typing import Iterator, List, Sequence, Union

_SUFFIX = '.tmp'
_LONGEST_START = 100  # bytes of the name that the temporary name begins with: file systems take 255 at most


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


def create_temporary(path: Union[str, os.PathLike]) -> str:
    """Create an empty file beside path, to be filled and moved to path. Returns its path, which no file had before."""
    folder, name = os.path.split(os.fspath(path))
    start = os.fsencode(name)[:_LONGEST_START].decode(errors='ignore')
    while True:
        temporary = os.path.join(folder, f'{start}.{secrets.token_hex(8)}{_SUFFIX}')
        with contextlib.suppress(FileExistsError):
            # O_EXCL follows no link; unlike those of tempfile the file gets the rights that the user's files have
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return temporary


def is_temporary(name: str) -> bool:
    """Whether a file has a name as `create_temporary` gives it. If nobody writes it any more, a kill left it behind."""
    return re.fullmatch(rf'.*\.[0-9a-f]{{16}}{re.escape(_SUFFIX)}', name, re.DOTALL) is not None


@contextlib.contextmanager
def write_whole(path: Union[str, os.PathLike]) -> Iterator[str]:
    """Give the path of a new, empty file to write to, and rename it to path at the end.

    After an error path is unchanged.
    """
    temporary = create_temporary(path)
    try:
        mode = os.stat(temporary).st_mode
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


def publish(staging: str, output: str, entries: Sequence[str]) -> None:
    """Move finished files and folders to their place. If that fails half way, what was there before is put back.

    Args:
        staging: Folder that holds them, on the file system of output. If there is no output, it is renamed to it.
        output: Folder to move them to.
        entries: Their names. What has such a name in output is moved to the folder `old` in staging.
    """
    if not os.path.lexists(output):
        os.rename(staging, output)
        return
    old = os.path.join(staging, 'old')
    os.mkdir(old)
    moved: List[str] = []
    try:
        for entry in entries:
            if os.path.lexists(os.path.join(output, entry)):
                os.rename(os.path.join(output, entry), os.path.join(old, entry))
            moved.append(entry)
            os.rename(os.path.join(staging, entry), os.path.join(output, entry))
    except BaseException:
        for entry in moved:
            if os.path.lexists(os.path.join(output, entry)):
                os.rename(os.path.join(output, entry), os.path.join(staging, entry))
            if os.path.lexists(os.path.join(old, entry)):
                os.rename(os.path.join(old, entry), os.path.join(output, entry))
        raise
