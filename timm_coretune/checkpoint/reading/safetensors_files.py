"""Map the tensors of a safetensors file into memory, and give the memory back after they were read"""

import json
import math
import mmap
from typing import BinaryIO, Dict, List, NamedTuple, Tuple

import torch
from safetensors import safe_open

from .limits import MAX_JSON, MAX_TENSORS, refuse

# those that torch computes with; the library makes tensors of all others, and of those that are empty
_DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
    'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
}  # fmt: skip


class Pages:
    """The pages of a file that is mapped into memory, and the tensors in them."""

    def __init__(self, file: BinaryIO) -> None:
        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._tensors: List[torch.Tensor] = []

    def tensor(self, dtype: torch.dtype, shape: Tuple[int, ...], start: int) -> torch.Tensor:
        """A tensor whose elements are the bytes of the file from `start` on."""
        flat = torch.frombuffer(self._mapped, dtype=dtype, count=math.prod(shape), offset=start)
        self._tensors.append(flat)
        return flat.view(shape)

    def can_be_read_again(self) -> bool:
        """Whether the tensors are what the file holds. Some of timm's filters write into tensors."""
        return not any(tensor._version for tensor in self._tensors)

    def give_back(self) -> None:
        """Take the pages out of memory, if they can be read again. The file is read when a tensor is used again."""
        if hasattr(mmap, 'MADV_DONTNEED'):
            self._mapped.madvise(mmap.MADV_DONTNEED)


class SafetensorsContent(NamedTuple):
    """What a safetensors file holds.

    Attributes:
        tensors: Its tensors by their keys.
        metadata: Texts by their names.
        pages: The memory that the tensors are mapped into.
    """

    tensors: Dict[str, torch.Tensor]
    metadata: Dict[str, str]
    pages: Pages


def read_safetensors(path: str) -> SafetensorsContent:
    """Map the tensors of a safetensors file. The library checks the header against the file before it is used."""
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if length > MAX_JSON:
            raise refuse(path, f'a safetensors file whose header has {length} bytes', f'At most {MAX_JSON} are read.')
        with safe_open(path, 'pt') as checked:
            keys = list(checked.keys())
            if len(keys) > MAX_TENSORS:
                raise refuse(path, f'a file of more than {MAX_TENSORS} tensors', 'Write those of the model alone.')
            header = json.loads(file.read(length))
            pages = Pages(file)
            tensors = {}
            for key in keys:
                entry = header[key]
                dtype = _DTYPES.get(entry['dtype'])
                start, end = (8 + length + offset for offset in entry['data_offsets'])
                if dtype is None or start == end:
                    tensors[key] = checked.get_tensor(key)
                else:
                    tensors[key] = pages.tensor(dtype, entry['shape'], start)
            return SafetensorsContent(tensors, checked.metadata() or {}, pages)
