"""Rebuild tensors, arrays and dictionaries from what a pickle says about them

The functions check each number against the storage or the bytes that are there, and call nothing of torch or numpy but
what makes a view of memory.
"""

import math
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch

from .unpickle import Name, Placeholder, Rebuilder, Rebuilt, Unpickler

# sizes of quantised elements, whose tensors are left out
_QUANTISED = {'QInt8': torch.int8, 'QUInt8': torch.uint8, 'QInt32': torch.int32, 'QUInt4x2': torch.uint8,
              'QUInt2x4': torch.uint8}  # fmt: skip
_STORAGES = {
    'Double': torch.float64, 'Float': torch.float32, 'Half': torch.float16, 'BFloat16': torch.bfloat16,
    'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16, 'Char': torch.int8, 'Byte': torch.uint8,
    'Bool': torch.bool, 'ComplexFloat': torch.complex64, 'ComplexDouble': torch.complex128, 'Untyped': torch.uint8,
    **_QUANTISED,
}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_MAX_NUMBER = 2**48  # no size, stride or offset of a file is larger
_ARRAY_KINDS = 'fiub'  # floats, integers and booleans
_MAX_DIMENSIONS = 16


class Storage(NamedTuple):
    """Bytes of a file, and the type of their elements."""

    dtype: torch.dtype
    content: torch.UntypedStorage


def storage_dtype(kind: str) -> torch.dtype:
    """Type of the elements of a storage, from the name of its class such as torch.FloatStorage."""
    name = kind.rpartition('.')[2].removesuffix('Storage')
    if not kind.startswith('torch.') or name not in _STORAGES:
        raise ValueError(f'a pickle with a storage of the unknown kind {kind}')
    return _STORAGES[name]


def _are_numbers(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value <= _MAX_NUMBER for value in values)


def _view(machine: Unpickler, args: Tuple[Any, ...], dtype: Optional[torch.dtype] = None) -> Any:
    """A tensor in a storage, from storage, offset, sizes and strides."""
    storage, offset, size, stride = args[:4]
    if not isinstance(storage, Storage):
        raise ValueError('a pickle with a tensor without storage')
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_DIMENSIONS):
        raise ValueError('a pickle with a tensor whose sizes and strides do not match')
    if not _are_numbers(offset, *size, *stride):
        raise ValueError('a pickle with a tensor whose sizes are no numbers of elements')
    dtype = dtype or storage.dtype
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if 0 not in size and end * dtype.itemsize > storage.content.nbytes():
        raise ValueError(f'a tensor of shape {size} in a storage of {storage.content.nbytes()} bytes')
    machine.count_tensor()
    return torch.empty(0, dtype=dtype, device='cpu').set_(storage.content, offset if end > offset else 0, size, stride)


def _tensor(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return _view(machine, args) if len(args) >= 4 else machine.placeholder('torch.Tensor')


def _tensor_of_dtype(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_tensor_v3, whose storage is untyped."""
    dtype = _DTYPES.get(args[6].text) if len(args) >= 7 and isinstance(args[6], Name) else None
    if dtype is None or str(dtype).startswith('torch.q'):
        return machine.placeholder('torch.Tensor')
    return _view(machine, args, dtype)


def _first(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_parameter and alike: the tensor alone, without what was attached to it."""
    return args[0] if args and isinstance(args[0], (torch.Tensor, Placeholder)) else machine.placeholder('torch.Tensor')


def _of_subclass(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """torch._tensor._rebuild_from_type_v2: the tensor alone, without its class and its attributes."""
    name, inner = 'torch._tensor._rebuild_from_type_v2', args
    while len(inner) == 4 and isinstance(inner[0], Name) and isinstance(inner[2], tuple):
        name, inner = inner[0].text, inner[2]
        if name != 'torch._tensor._rebuild_from_type_v2':
            return machine.construct(Name(name), inner)
    return machine.placeholder(name)


def _ordered_dict(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """collections.OrderedDict, empty or from pairs."""
    filled: Dict[str, Any] = {}
    for pair in args[0] if args and isinstance(args[0], list) else ():
        machine.spend(1)
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            machine.set_items(filled, list(pair))
    return filled


def _copied(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """copyreg._reconstructor: an object of a class (its base, and the content if the base is dict)."""
    made_of = args[0] if args and isinstance(args[0], Name) else Name('object')
    if len(args) == 3 and isinstance(args[2], dict):
        return Placeholder(made_of.text, args[2])
    return machine.placeholder(made_of.text)


def _new(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """copyreg.__newobj__: a class and its arguments."""
    machine.spend(len(args))
    return machine.construct(args[0], args[1:])


def _encoded(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """_codecs.encode, with which protocol 2 writes bytes."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ('latin1', 'latin-1'):
        return machine.placeholder('_codecs.encode')
    machine.spend(len(args[0]))
    return args[0].encode('latin-1')


def _bytes(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    return b'' if not args else machine.placeholder('builtins.bytes')


class Dtype(Rebuilt):
    """Type of the elements of an array."""

    def __init__(self, code: Any) -> None:
        self.code = code if isinstance(code, str) else ''
        self.order = '|'

    def build(self, state: Any) -> None:
        # version, order of bytes, then what only structured types have
        plain = isinstance(state, tuple) and len(state) >= 5 and state[1] in ('<', '>', '|', '=') and state[2] is None
        self.order = state[1] if plain and state[3] is None and state[4] is None else ''

    def find(self) -> Optional[np.dtype]:
        """The type, None if its elements are no plain numbers."""
        code = self.code.lstrip('<>|=')
        if not (self.order and code[:1] in _ARRAY_KINDS and code[1:] in ('1', '2', '4', '8')):
            return None
        try:
            return np.dtype((self.order if self.code == code else self.code[0]) + code)
        except TypeError:
            return None


class Array(Rebuilt):
    """An array of numpy. It becomes a tensor when the tree is searched."""

    def __init__(self) -> None:
        self.shape: Any = None
        self.dtype: Any = None
        self.content: Any = None
        self.order = 'C'
        self._tensor: Optional[torch.Tensor] = None

    def build(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.dtype, is_fortran, self.content = state
            self.order = 'F' if is_fortran else 'C'

    def tensor(self, spend: Any) -> Optional[torch.Tensor]:
        """The array as a tensor, None if its elements are no plain numbers.

        Args:
            spend: Called with the number of bytes that are copied.
        """
        if self._tensor is not None:
            return self._tensor
        dtype = self.dtype.find() if isinstance(self.dtype, Dtype) else None
        content = self.content.encode('latin-1') if isinstance(self.content, str) else self.content  # of Python 2
        shape = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        if dtype is None or not isinstance(content, (bytes, bytearray)) or len(shape) > _MAX_DIMENSIONS:
            return None
        if not _are_numbers(*shape) or math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f'an array of shape {shape} with {len(content)} bytes')
        spend(len(content))
        array = np.frombuffer(content, dtype).reshape(shape, order='F' if self.order == 'F' else 'C')
        self._tensor = torch.from_numpy(array.astype(dtype.newbyteorder('='), order='C', copy=True))
        self.content = None
        return self._tensor


def _array(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """numpy.core.multiarray._reconstruct: an empty array that gets its state later."""
    return Array()


def _array_of_bytes(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    """numpy.core.numeric._frombuffer: bytes, type, shape, order."""
    array = Array()
    if len(args) == 4:
        array.content, array.dtype, array.shape, order = args
        array.order = 'F' if order == 'F' else 'C'
    return array


def _dtype(machine: Unpickler, args: Tuple[Any, ...]) -> Any:
    return Dtype(args[0] if args else '')


REBUILDERS: Dict[str, Rebuilder] = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_of_dtype,
    'torch._utils._rebuild_parameter': _first,
    'torch._utils._rebuild_parameter_with_state': _first,
    'torch.nn.parameter.Parameter': _first,
    'torch._tensor._rebuild_from_type_v2': _of_subclass,
    'collections.OrderedDict': _ordered_dict,
    'copyreg._reconstructor': _copied,
    'copyreg.__newobj__': _new,
    '_codecs.encode': _encoded,
    'builtins.bytes': _bytes,
    'numpy._core.multiarray._reconstruct': _array,
    'numpy._core.numeric._frombuffer': _array_of_bytes,
    'numpy.dtype': _dtype,
}
