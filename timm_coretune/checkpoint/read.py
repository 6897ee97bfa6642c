"""Read checkpoint files into nested dictionaries of tensors, without running code from them

Pickles are read by `reading.unpickle`, which imports and calls nothing that a file names. What a file says about itself
is checked. Tensors are mapped into memory and stay on disk until they are used.
"""

import collections
from collections import Counter
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch

from .reading.configs import FILE
from .reading.limits import MAX_DEPTH, UnreadableError, refuse, refuse_damaged
from .reading.npz import check_npz
from .reading.safetensors_files import Pages, read_safetensors
from .reading.torch_files import PickleContent, read_archive, read_pickle
from .reading.tree import plain_tree
from .reading.unpickle import CommandError, Placeholder
from .report import count_objects
from .sniff import sniff, unpacked_size

BATCH_BYTES = 64 * 2**20  # of a file that are in memory at once, or one tensor more


class Checkpoint(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        source: The checkpoint as the user named it.
        kind: Format of the files, as `sniff` names it.
        files: Paths of the files.
        tree: Nested dictionaries with tensors at their leaves.
        pages: Memory that the tensors of safetensors files are mapped into, one item for each file.
        config: Contents of the JSON files beside the weights, by file name. The metadata of a safetensors file is
            under 'metadata' and the path of this file under FILE, the short name of a published checkpoint under
            'release'.
        left_out: Number of objects of each class that are in a pickle beside tensors, and were not rebuilt.
    """

    source: str
    kind: str
    files: Tuple[str, ...]
    tree: Dict[str, Any]
    pages: Tuple[Pages, ...]
    config: Dict[str, Any]
    left_out: Dict[str, int] = {}

    def batches(self, tensors: Dict[str, torch.Tensor]) -> Iterator[Dict[str, torch.Tensor]]:
        """Yield tensors in batches, in the order of the file, and take each batch out of memory after its use.

        If all pages of a safetensors file stayed in memory after they were read, the whole file would be there beside
        the model. Tensors that fill no batch stay: mapping them again takes longer than reading them. Those that stand
        for several, see `renames.fuse`, are concatenated.
        """
        is_large = sum(tensor.nbytes for tensor in tensors.values()) >= BATCH_BYTES
        read_again = [pages for pages in self.pages if is_large and pages.can_be_read_again()]
        batch: Dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: parts_of(item[1])[0].data_ptr()):
            parts = parts_of(tensor)
            batch[name] = torch.cat(parts) if len(parts) > 1 else tensor
            size += tensor.nbytes
            if size >= BATCH_BYTES:
                yield batch
                batch, size = {}, 0
                for pages in read_again:
                    pages.give_back()
        yield batch
        for pages in read_again:
            pages.give_back()


def read_torch(path: str, kind: str) -> PickleContent:
    """Read a file of torch.save or a plain pickle, without running code from it."""
    if path.endswith('.safetensors'):  # other libraries tell this format by the name
        raise refuse(path, 'a file of torch.save with the name of another format', 'Rename it to .pth.')
    try:
        read = read_archive(path) if kind == 'torch' else read_pickle(path)
    except CommandError as e:
        raise UnreadableError(
            f'Expected tensors and plain data in {path!r}, got a pickle that wants to import {e}, which runs commands. '
            'It was not read. Do not trust its source: get the weights from their publisher, if possible as '
            'safetensors.'
        ) from e
    if isinstance(read.content, Placeholder) and not read.content.items:
        raise UnreadableError(
            f'Expected tensors by name in {path!r}, got one object of {read.content.name}, in a pickle that wants to '
            f'import {count_objects(read.left_out)}. Importing runs code of whoever wrote the file, so it was not '
            'read. Save its state_dict() where the class is known, or ask its publisher for safetensors.'
        )
    return read


def read_files(source: str, files: Tuple[str, ...], config: Dict[str, Any]) -> Checkpoint:
    """Read one file, or the shards of one state dict.

    Raises:
        UnreadableError: A file is no checkpoint, is damaged, or reading it would need to run code from it.
    """
    tree: Dict[str, Any] = {}
    pages: List[Pages] = []
    left_out: Counter = Counter()
    kind = ''
    for path in files:
        kind = sniff(path)
        if kind == 'index' or (kind == 'npz' and len(files) > 1):
            what = 'a list of files' if kind == 'index' else 'a JAX archive'
            raise refuse(path, f'{what} where a part of the weights was expected', 'Get the whole release again.')
        try:
            part: Any = {}
            if kind == 'safetensors':
                part, metadata, mapped = read_safetensors(path)
                pages.append(mapped)
                config = {**config, 'metadata': metadata, FILE: path}
            elif kind == 'npz':
                check_npz(path)
            else:
                read = read_torch(path, kind)
                part = read.content
                left_out += read.left_out
            if not isinstance(part, (dict, Placeholder)):
                raise UnreadableError(f'Expected tensors by name in {path!r}, got one {type(part).__name__}.')
            tree.update(plain_tree(path, part, unpacked_size(path)))
        except UnreadableError:
            raise
        except Exception as e:  # the parsers of zip, pickle, JSON, numpy and torch raise what they like
            raise refuse_damaged(path, e, 'safetensors file' if kind == 'safetensors' else 'file') from e
    return Checkpoint(source, kind, files, tree, tuple(pages), config, dict(left_out))


def parts_of(tensor: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Tensors of the file that a tensor is made of, see `renames.fuse`."""
    return getattr(tensor, 'parts', (tensor,))


def walk(tree: Dict[str, Any]) -> Iterator[Tuple[str, Dict[str, torch.Tensor]]]:
    """Yield each dictionary inside a file that holds tensors, with the keys that lead to it. Outer ones come first."""
    queue = collections.deque([('', tree, 0)])
    seen = set()  # one dictionary can be in many places of a pickle, even inside itself
    while queue:
        path, node, depth = queue.popleft()
        if id(node) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(node))
        tensors = {k: v for k, v in node.items() if isinstance(v, torch.Tensor)}
        if tensors:
            yield path, tensors
        for key, value in node.items():
            if isinstance(value, dict):
                queue.append((f'{path}/{key}'.lstrip('/'), value, depth + 1))
