"""Check the arrays of an npz archive before timm reads them: numpy makes each as large as its header says"""

import math
import zipfile

from numpy.lib import format as npy

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def check_npz(path: str) -> None:
    """Compare the header of each array with the bytes that are there.

    Raises:
        ValueError: An array holds no plain numbers, or not as many as its header says. Damaged archives and headers
            raise what their parsers raise.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as f:
                version = npy.read_magic(f)
                if version not in _HEADERS:
                    raise ValueError(f'{entry.filename} has an unknown version')
                shape, _, dtype = _HEADERS[version](f)
                if dtype.hasobject or dtype.kind not in 'fiub':
                    raise ValueError(f'{entry.filename} holds {dtype}, no plain numbers')
                size = math.prod(shape) * dtype.itemsize
                if size != entry.file_size - f.tell():
                    raise ValueError(
                        f'{entry.filename} of shape {shape} has {size} bytes by its header and '
                        f'{entry.file_size - f.tell()} in the archive'
                    )
