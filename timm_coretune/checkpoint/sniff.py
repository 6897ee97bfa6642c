"""Tell the format of a file from its first bytes, whatever its name"""

import os
import stat
import zipfile
from typing import List

from ..checks import clip, shorten
from .reading.limits import MAX_UNPACKED, refuse
from .reading.torch_files import PICKLE_NAME

_SIGNATURES = (  # first bytes of a file, what the file is, what to do
    (b'version https://git-lfs', 'a git-lfs pointer', 'Fetch the file itself: git lfs pull.'),
    (b'\x1f\x8b', 'a gzip archive', 'Unpack it first: gunzip or tar xzf.'),
    (b'BZh', 'a bzip2 archive', 'Unpack it first: bunzip2.'),
    (b'\xfd7zXZ', 'an xz archive', 'Unpack it first: unxz.'),
    (b'\x28\xb5\x2f\xfd', 'a zstd archive', 'Unpack it first: unzstd.'),
    (b'\x89HDF', 'an HDF5 file', 'Keras weights are not supported.'),
)

_KINDS = ((stat.S_ISDIR, 'a folder'), (stat.S_ISFIFO, 'a named pipe'), (stat.S_ISSOCK, 'a socket'),
          (stat.S_ISCHR, 'a device'), (stat.S_ISBLK, 'a device'))  # fmt: skip


def file_size(path: str) -> int:
    """Size of a file, which is not opened, as opening a pipe or a device may wait forever.

    Raises:
        UnreadableError: There is no such file, or it is something else than a file.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        what = f'a link to {clip(os.readlink(path))!r}, which is not there' if os.path.islink(path) else clip(str(e))
        raise refuse(path, what, 'Copy the file itself.') from e
    kind = next((name for matches, name in _KINDS if matches(found.st_mode)), None)
    if kind is not None:
        raise refuse(path, kind, 'Give the path of a file.')
    return found.st_size


def sniff(path: str) -> str:
    """Tell the format of a checkpoint file.

    Returns:
        'safetensors', 'torch' (a zip archive of torch.save), 'torch legacy' (a pickle, as its older format is), 'npz',
        or 'index' (JSON that lists the shards of a state dict).

    Raises:
        UnreadableError: The file is something else. The message says what it is and what to do.
    """
    size = file_size(path)
    try:
        with open(path, 'rb') as f:
            head = f.read(512)
    except OSError as e:
        raise refuse(path, f'closed to this user ({e.strerror})', 'Ask its owner for the right to read it.') from e
    text = head.lstrip().lower()
    if not size:
        raise refuse(path, 'an empty file', 'The download or the copy failed: get it again.')
    # safetensors is tested first: a file begins with the length of its header, and the bytes of this number can equal
    # those that another format begins with
    header_length = int.from_bytes(head[:8], 'little')
    if head[8:9] == b'{' and header_length <= size - 8:
        return 'safetensors'
    for start, what, fix in _SIGNATURES:
        if head.startswith(start):
            raise refuse(path, what, fix)
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        raise refuse(path, 'a web page', 'The URL leads to a page about the file: take the URL of the file itself.')
    if head[257:262] == b'ustar':
        raise refuse(path, 'a tar archive', 'Unpack it first: tar xf.')
    if head.startswith(b'PK\x03\x04'):
        return _sniff_zip(path, size)
    if head.startswith(b'\x80'):
        return 'torch legacy'
    if text.startswith(b'{') and b'"weight_map"' in text or path.endswith('.index.json'):
        return 'index'
    if head[8:9] == b'{':
        what = f'a safetensors header of {header_length} bytes in a file of {size}'
        raise refuse(path, what, 'The file is incomplete: get it again.')
    raise refuse(path, f'an unknown format that starts with {head[:8]!r}', 'Is it another file of the release?')


def unpacked_size(path: str) -> int:
    """Bytes of a file, or to which it unpacks if it is an archive."""
    size = os.path.getsize(path)
    return max(size, sum(entry.file_size for entry in _entries(path))) if zipfile.is_zipfile(path) else size


def _entries(path: str) -> List[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception as e:  # zipfile raises what the damaged bytes lead to
        raise refuse(path, f'an archive that is damaged ({e})', 'The file is incomplete: get it again.') from e


def _sniff_zip(path: str, size: int) -> str:
    """Tell the format of a zip archive, 'torch' or 'npz'. One that unpacks to far more than its size is refused."""
    entries = _entries(path)
    unpacked = sum(entry.file_size for entry in entries)
    names = [entry.filename for entry in entries]
    if any(name.endswith('/constants.pkl') for name in names):
        raise refuse(
            path,
            'a TorchScript archive, a program',
            'If you trust the file, write safetensors.torch.save_file(torch.jit.load(path).state_dict(), destination). '
            'The weights of OpenAI CLIP are also in hf-hub:openai/clip-vit-base-patch32 and its siblings.',
        )
    # weights are noise: packed, they become smaller by a tenth, those that are mostly zeros to a few percent
    if unpacked > MAX_UNPACKED * size + 2**20:
        raise refuse(path, f'an archive of {size} bytes that unpacks to {unpacked}', 'Do not trust its source.')
    if all(name.endswith('.npy') for name in names):
        return 'npz'
    if not any(name.rpartition('/')[2] == PICKLE_NAME for name in names):
        what = f'an archive of other files ({shorten(sorted(names), 3)})'
        raise refuse(path, what, 'Unpack it first, if the checkpoint is in it.')
    return 'torch'
