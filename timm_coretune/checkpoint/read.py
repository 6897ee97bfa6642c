"""From files to nested dictionaries of tensors, without running or believing what is in them

Pickles are read by torch's weights-only unpickler and there is no other way to read them here. Tensors stay on disk,
mapped into memory, until they are used.
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

SMALL_BYTES = 2**19  # tensors below this are together a small part of a model, and not worth a mapping of their own
BATCH_BYTES = 4 * 2**20  # tensors of this size together are read at once when a file is copied into a model
MAX_DEPTH = 8  # of nested dictionaries; VISSL's are the deepest known, 4


def _allowed_globals() -> List[Any]:
    """All that a pickle may name besides tensors: types that hold data and do nothing else when they are rebuilt."""
    core = np._core if hasattr(getattr(np, '_core', None), 'multiarray') else np.core  # of numpy 2, of numpy 1
    scalars = (np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8, np.bool_)
    allowed: List[Any] = [
        argparse.Namespace,  # arguments of the run, in files of DINO, MAE, SupContrast and many others
        np.dtype,
        np.ndarray,
        *{type(np.dtype(s)) for s in scalars},
    ]
    # numpy 2 renamed its core, files of either age are read by either; pickled paths become pure ones
    for name in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed.append((core.multiarray.scalar, f'{name}.scalar'))
        allowed.append((core.multiarray._reconstruct, f'{name}._reconstruct'))
    for module in ('pathlib', 'pathlib._local'):
        allowed.append((pathlib.PurePosixPath, f'{module}.PosixPath'))
        allowed.append((pathlib.PureWindowsPath, f'{module}.WindowsPath'))
    return allowed


Places = Dict[Tuple[int, int], Tuple[str, str]]


class Checkpoint(NamedTuple):
    """What a source holds.

    Attributes:
        source: As the user named it.
        kind: Format of the files.
        files: Their paths.
        tree: Nested dictionaries with tensors at their leaves.
        places: File and key of each tensor by its address and length, where it can be read again on its own.
        config: What JSON files beside the weights and the file's own metadata tell of the network and its input.
    """

    source: str
    kind: str
    files: Tuple[str, ...]
    tree: Dict[str, Any]
    places: Places
    config: Dict[str, Any]

    def batches(self, tensors: Dict[str, torch.Tensor]) -> Iterator[Dict[str, torch.Tensor]]:
        """The same tensors a few at a time, each few through a fresh mapping of their files.

        Pages of a mapping stay in memory once they are read. Read through one mapping, the whole file would be in
        memory beside the model.
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
    """Read a file of torch.save, with the weights-only unpickler and the allowed globals."""
    if path.endswith('.safetensors'):  # torch goes by the name, and would not use its unpickler
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
            'Importing runs code of whoever wrote the file, so it was not read. Ask its publisher for safetensors, or, '
            'on a machine where you trust the file, load it with torch.load(path, weights_only=False) and write its '
            'tensors with safetensors.torch.save_file.'
        ) from e
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, AttributeError, TypeError, IndexError,
            OverflowError, MemoryError, AssertionError) as e:  # fmt: skip
        raise refuse(path, f'a damaged file ({str(e).splitlines()[0] if str(e) else e!r})', 'Get it again.') from e


def read_safetensors(path: str) -> Tuple[Dict[str, torch.Tensor], Dict[str, str]]:
    """Map a safetensors file, and read its metadata. The library checks the header against the file."""
    try:
        with safe_open(path, 'pt') as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError, MemoryError, OverflowError) as e:
        raise refuse(path, f'a damaged safetensors file ({e})', 'Get it again.') from e
    return tensors, metadata


def read_files(source: str, files: Tuple[str, ...], config: Dict[str, Any]) -> Checkpoint:
    """Read one file, or the shards of one state dict.

    Raises:
        ValueError: A file is no checkpoint, is damaged, or would have to be trusted.
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
    """A tensor of a file cannot hold more than the file; one that says so repeats its memory."""
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
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def walk(tree: Dict[str, Any]) -> Iterator[Tuple[str, Dict[str, torch.Tensor]]]:
    """Each dictionary inside a file that holds tensors, with the path of keys to it, outer ones first."""
    queue = collections.deque([('', tree, 0)])
    seen = set()  # a pickle can hold one dictionary in many places
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
