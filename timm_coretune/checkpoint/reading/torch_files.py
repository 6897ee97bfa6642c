"""Read the files of torch.save, and plain pickles, without running them

A file is a zip archive with a pickle and the storages of its tensors beside it. In the older format it is several
pickles one after the other with the storages behind them. torch.load is not used, although it has a way to read without
running code: it refuses a file for one object of another library, makes storages as large as the file says, and keeps
the attributes that a tensor of the file has.
"""

import io
import mmap
import os
import struct
import zipfile
from collections import Counter
from typing import Any, BinaryIO, Dict, NamedTuple, Tuple, cast

import torch

from .rebuild import REBUILDERS, Storage, storage_dtype
from .unpickle import StorageId, Unpickler

PICKLE_NAME = 'data.pkl'  # in the archive, in a folder of any name
_LOCAL_HEADER = 30  # bytes before the name of an entry
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # in the first pickle of the older format of torch.save


class PickleContent(NamedTuple):
    """What a pickle holds.

    Attributes:
        content: Dictionaries, lists, tensors, arrays and placeholders.
        left_out: Number of objects that became placeholders, by the name of their class.
    """

    content: Any
    left_out: Counter


def read_archive(path: str) -> PickleContent:
    """Read a zip archive of torch.save. Its tensors stay on the disk until they are used, unless it is compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickle_name = next(name for name in entries if name.rpartition('/')[2] == PICKLE_NAME)
        root = pickle_name[: -len(PICKLE_NAME)]
        swapped = f'{root}byteorder' in entries and archive.read(f'{root}byteorder')[:8] == b'big'
        size = os.path.getsize(path)
        mapped = torch.UntypedStorage.from_file(path, False, size)
        storages: Dict[str, torch.UntypedStorage] = {}
        with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as raw:

            def read_storage(entry: zipfile.ZipInfo, alignment: int) -> torch.UntypedStorage:
                header = raw[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
                start = entry.header_offset + _LOCAL_HEADER + sum(struct.unpack('<HH', header[26:30]))
                is_stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
                if not is_stored or start % alignment or swapped:
                    return _storage_of(archive.read(entry))
                if header[:4] != b'PK\x03\x04' or start + entry.file_size > size:
                    raise ValueError(f'an entry {entry.filename} that ends outside of the file')
                return cast(torch.UntypedStorage, mapped[start : start + entry.file_size])

            def load_storage(wanted: StorageId) -> Storage:
                dtype = storage_dtype(wanted.kind)
                if wanted.key not in storages:
                    content = read_storage(entries[f'{root}data/{wanted.key}'], dtype.itemsize)
                    storages[wanted.key] = _swap(content, dtype) if swapped else content
                content = storages[wanted.key]
                if wanted.length * dtype.itemsize > content.nbytes():
                    raise ValueError(f'{content.nbytes()} bytes for {wanted.length} elements of {dtype}')
                return Storage(dtype, content)

            unpacked = sum(entry.file_size for entry in entries.values())
            machine = Unpickler(io.BytesIO(archive.read(pickle_name)), unpacked, REBUILDERS, load_storage)
            return PickleContent(machine.load(), machine.left_out)


def read_pickle(path: str) -> PickleContent:
    """Read a file of the older format of torch.save, or one plain pickle."""
    with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        # mmap objects have the methods for reading that are called
        return _read_pickles(cast(BinaryIO, raw), os.path.getsize(path))


def _read_pickles(file: BinaryIO, size: int) -> PickleContent:
    """Read the pickles of the older format and the storages behind them, or one plain pickle."""
    pending: Dict[str, Storage] = {}

    def load_storage(wanted: StorageId) -> Storage:
        dtype = storage_dtype(wanted.kind)
        if wanted.key not in pending:
            if not 0 <= wanted.length * dtype.itemsize <= size:
                raise ValueError(f'{wanted.length} elements of {dtype} in a file of {size} bytes')
            machine.spend(wanted.length * dtype.itemsize)
            pending[wanted.key] = Storage(dtype, torch.UntypedStorage(wanted.length * dtype.itemsize))
        whole = pending[wanted.key]
        start, end = (n * dtype.itemsize for n in (wanted.view[0], sum(wanted.view)))
        if not 0 <= start <= end <= whole.content.nbytes():
            raise ValueError(f'a part from byte {start} to {end} of a storage of {whole.content.nbytes()} bytes')
        part = whole.content if end - start == whole.content.nbytes() else whole.content[start:end]
        return Storage(dtype, cast(torch.UntypedStorage, part))

    machine = Unpickler(file, size, {**REBUILDERS, 'torch.storage._load_from_bytes': _read_nested}, load_storage)
    first = machine.load()
    if first != _MAGIC_NUMBER:
        return PickleContent(first, machine.left_out)
    machine.load()  # version of the format
    system = machine.load()
    content = machine.load()
    keys = machine.load()
    swapped = isinstance(system, dict) and system.get('little_endian') is False
    for key in keys if isinstance(keys, list) else ():
        storage = pending.pop(str(key))
        (count,) = struct.unpack('>q' if swapped else '<q', file.read(8))
        if count * storage.dtype.itemsize != storage.content.nbytes():
            raise ValueError(f'{count} elements for a storage of {storage.content.nbytes()} bytes')
        read = _storage_of(file.read(storage.content.nbytes()))
        if read.nbytes() != storage.content.nbytes():
            raise ValueError('a file that ends within a tensor')
        storage.content.copy_(_swap(read, storage.dtype) if swapped else read)
    if pending:
        raise ValueError(f'no bytes for {len(pending)} of its storages')
    return PickleContent(content, machine.left_out)


def _read_nested(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """torch.storage._load_from_bytes: a storage in a plain pickle, as a file of the older format within the file."""
    if len(args) != 1 or not isinstance(args[0], bytes):
        return machine.placeholder('torch.storage._load_from_bytes')
    machine.spend(len(args[0]))
    return _read_pickles(io.BytesIO(args[0]), len(args[0])).content


def _storage_of(content: bytes) -> torch.UntypedStorage:
    """A storage in memory."""
    if not content:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()


def _swap(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.UntypedStorage:
    """Reverse the bytes of each element, of a file from a machine that writes the largest first."""
    storage.byteswap(dtype)
    return storage
