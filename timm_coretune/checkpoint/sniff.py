"""Tell the format of a file from its first bytes, whatever its name"""

import zipfile
from pathlib import Path


def refuse(path: str, got: str, fix: str) -> ValueError:
    """Create the error for a file that is no checkpoint: what it is instead, and what to do."""
    return ValueError(
        f'Expected a checkpoint in safetensors or PyTorch format, could not read {path!r}: it is {got}. {fix}'
    )


_SIGNATURES = (  # first bytes of a file, what the file is, what to do
    (b'version https://git-lfs', 'a git-lfs pointer', 'Fetch the file itself: git lfs pull.'),
    (b'\x1f\x8b', 'a gzip archive', 'Unpack it first: gunzip or tar xzf.'),
    (b'BZh', 'a bzip2 archive', 'Unpack it first: bunzip2.'),
    (b'\xfd7zXZ', 'an xz archive', 'Unpack it first: unxz.'),
    (b'\x28\xb5\x2f\xfd', 'a zstd archive', 'Unpack it first: unzstd.'),
    (b'\x89HDF', 'an HDF5 file', 'Keras weights are not supported.'),
)


def sniff(path: str) -> str:
    """Tell the format of a checkpoint file.

    Returns:
        'safetensors', 'torch' (a zip archive of torch.save), 'torch legacy' (its older format, a pickle), 'npz', or
        'index' (JSON that lists the shards of a state dict).

    Raises:
        ValueError: The file is something else. The message says what it is and what to do.
    """
    size = Path(path).stat().st_size
    with open(path, 'rb') as f:
        head = f.read(512)
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


def _sniff_zip(path: str, size: int) -> str:
    """Tell the format of a zip archive, 'torch' or 'npz'. One that unpacks to far more than its size is refused."""
    try:
        entries = zipfile.ZipFile(path).infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise refuse(path, f'an archive that is damaged ({e})', 'The file is incomplete: get it again.') from e
    unpacked = sum(entry.file_size for entry in entries)
    names = [entry.filename for entry in entries]
    if all(name.endswith('.npy') for name in names):
        if unpacked > 20 * size:
            raise refuse(path, f'an archive of {size} bytes that unpacks to {unpacked}', 'Do not trust its source.')
        return 'npz'
    if any(name.endswith('/constants.pkl') for name in names):
        raise refuse(
            path,
            'a TorchScript archive, a program',
            'If you trust the file, write safetensors.torch.save_file(torch.jit.load(path).state_dict(), destination). '
            'The weights of OpenAI CLIP are also in hf-hub:openai/clip-vit-base-patch32 and its siblings.',
        )
    # torch does not compress tensors, so torch did not write an archive that unpacks to more than its size
    if unpacked > size + 2**20:
        raise refuse(path, f'an archive of {size} bytes that unpacks to {unpacked}', 'Do not trust its source.')
    return 'torch'
