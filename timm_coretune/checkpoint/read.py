"""Read checkpoint files into nested dictionaries of tensors, without running code from them

Pickles are read only with torch's weights-only unpickler. What a file says about itself is checked. Tensors are mapped
into memory and stay on disk until they are used.
"""

import argparse
import collections
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .sniff import refuse, sniff

SMALL_BYTES = 2**19  # smaller tensors are not mapped again, see Checkpoint.batches: together they need little memory
BATCH_BYTES = 4 * 2**20  # size of the batches of tensors that are copied into a model
MAX_DEPTH = 8  # dictionaries that are nested deeper are not searched; the deepest known format, of VISSL, has depth 4


def _allowed_globals() -> List[Any]:
    """Globals that a pickle may name besides tensors: types that only hold data. Rebuilding them runs no other code."""
    numpy2_core: Any = getattr(np, '_core', None)
    core: Any = numpy2_core if hasattr(numpy2_core, 'multiarray') else np.core  # the name in numpy 1
    scalars = (np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8, np.bool_)
    allowed: List[Any] = [
        argparse.Namespace,  # DINO, MAE, SupContrast and many others save the arguments of the run
        np.dtype,
        np.ndarray,
        *{type(np.dtype(s)) for s in scalars},
    ]
    # numpy 2 renamed its core; both names are allowed, so numpy 1 and 2 read each other's files
    for name in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed.append((core.multiarray.scalar, f'{name}.scalar'))
        allowed.append((core.multiarray._reconstruct, f'{name}._reconstruct'))
    # paths are rebuilt as pure paths, which cannot touch the file system
    for module in ('pathlib', 'pathlib._local'):
        allowed.append((pathlib.PurePosixPath, f'{module}.PosixPath'))
        allowed.append((pathlib.PureWindowsPath, f'{module}.WindowsPath'))
    return allowed


Places = Dict[Tuple[int, int], Tuple[str, str]]  # (address, number of elements) -> (file, key)


class Checkpoint(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        source: The checkpoint as the user named it.
        kind: Format of the files, as `sniff` names it.
        files: Paths of the files.
        tree: Nested dictionaries with tensors at their leaves.
        places: File and key of each tensor of a safetensors file, by the address and number of its elements. With
            them the tensor can be read again on its own.
        config: Contents of the JSON files beside the weights, by file name. The metadata of a safetensors file is
            under 'metadata', the short name of a published checkpoint under 'release'.
    """

    source: str
    kind: str
    files: Tuple[str, ...]
    tree: Dict[str, Any]
    places: Places
    config: Dict[str, Any]

    def batches(self, tensors: Dict[str, torch.Tensor]) -> Iterator[Dict[str, torch.Tensor]]:
        """Yield tensors in small batches, each read through a new memory mapping of the files.

        Pages of a mapping stay in memory after they are read. If all tensors were read through one mapping, the whole
        file would be in memory beside the model.
        """
        batch: Dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in tensors.items():
            batch[name] = tensor
            size += tensor.numel() * tensor.element_size()
            if size >= BATCH_BYTES:
                yield self._read_again(batch)
                batch, size = {}, 0
        if batch:
            yield self._read_again(batch)

    def _read_again(self, tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Read tensors through a new mapping, and concatenate those that stand for several, see `renames.fuse`."""
        handles: Dict[str, Any] = {}

        def again(tensor: torch.Tensor) -> torch.Tensor:
            small = tensor.numel() * tensor.element_size() < SMALL_BYTES
            place = None if small else self.places.get((tensor.data_ptr(), tensor.numel()))
            if place is None or not tensor.is_contiguous():
                return tensor
            file, key = place
            if file not in handles:
                handles[file] = safe_open(file, 'pt')
            return handles[file].get_tensor(key).reshape(tensor.shape)

        return {
            name: torch.cat([again(part) for part in tensor.parts]) if hasattr(tensor, 'parts') else again(tensor)
            for name, tensor in tensors.items()
        }


def read_torch(path: str, kind: str) -> Any:
    """Read a file of torch.save with the weights-only unpickler."""
    if path.endswith('.safetensors'):  # torch.load tells this format by the name and would not unpickle
        raise refuse(path, 'a file of torch.save with the name of another format', 'Rename it to .pth.')
    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=kind == 'torch')
    except pickle.UnpicklingError as e:
        wanted = sorted(set(re.findall(r'GLOBAL ([\w.]+)', str(e))))
        if kind == 'torch':
            with torch.serialization.safe_globals(_allowed_globals()):
                wanted = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or wanted
        if not wanted:
            raise refuse(path, 'a pickle that is no file of torch.save', 'Is it another file of the release?') from e
        raise ValueError(
            f'Expected tensors and plain data in {path!r}, got a pickle that wants to import {", ".join(wanted)}. '
            'Importing runs code of whoever wrote the file, so it was not read. Ask its publisher for safetensors. If '
            'you trust the file, load it with torch.load(path, weights_only=False) and write its '
            'tensors with safetensors.torch.save_file.'
        ) from e
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, AttributeError, TypeError, IndexError,
            OverflowError, MemoryError, AssertionError) as e:  # fmt: skip
        raise refuse(path, f'a damaged file ({str(e).splitlines()[0] if str(e) else e!r})', 'Get it again.') from e


def read_safetensors(path: str) -> Tuple[Dict[str, torch.Tensor], Dict[str, str]]:
    """Map the tensors of a safetensors file and read its metadata. safetensors checks the header against the file."""
    try:
        with safe_open(path, 'pt') as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (f is no mapping)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError, MemoryError, OverflowError) as e:
        raise refuse(path, f'a damaged safetensors file ({e})', 'Get it again.') from e
    return tensors, metadata


def read_files(source: str, files: Tuple[str, ...], config: Dict[str, Any]) -> Checkpoint:
    """Read one file, or the shards of one state dict.

    Raises:
        ValueError: A file is no checkpoint, is damaged, or reading it would need to run code from it.
    """
    tree: Dict[str, Any] = {}
    places: Places = {}
    kind = ''
    for path in files:
        kind = sniff(path)
        if kind == 'safetensors':
            part, metadata = read_safetensors(path)
            places.update({(t.data_ptr(), t.numel()): (path, key) for key, t in part.items() if t.numel()})
            config = {**config, 'metadata': metadata}
        elif kind == 'npz':
            part = {}
        else:
            part = read_torch(path, kind)
        if not isinstance(part, dict):
            raise ValueError(f'Expected tensors by name in {path!r}, got one {type(part).__name__}.')
        tree.update(part)
        _check_sizes(path, part)
    return Checkpoint(source, kind, files, tree, places, config)


def _check_sizes(path: str, tree: Dict[str, Any]) -> None:
    """Refuse a tensor that is larger than its file: it repeats bytes, and a copy of it could fill the memory."""
    size = Path(path).stat().st_size
    for container, tensors in walk(tree):
        for key, tensor in tensors.items():
            if tensor.numel() * tensor.element_size() > size:
                raise refuse(
                    path,
                    f'a tensor {container}/{key} of shape {tuple(tensor.shape)} in a file of {size} bytes',
                    'Do not trust its source.',
                )


def _is_dense(value: Any) -> bool:
    """Whether a value is a plain tensor: neither sparse nor quantised."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def walk(tree: Dict[str, Any]) -> Iterator[Tuple[str, Dict[str, torch.Tensor]]]:
    """Yield each dictionary inside a file that holds tensors, with the keys that lead to it. Outer ones come first."""
    queue = collections.deque([('', tree, 0)])
    seen = set()  # one dictionary can be in many places of a pickle, even inside itself
    while queue:
        path, node, depth = queue.popleft()
        if id(node) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(node))
        tensors = {k: v for k, v in node.items() if isinstance(k, str) and _is_dense(v)}
        if tensors:
            yield path, tensors
        for key, value in node.items():
            if isinstance(key, str) and isinstance(value, dict):
                queue.append((f'{path}/{key}'.lstrip('/'), value, depth + 1))
