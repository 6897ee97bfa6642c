"""Rename the tensors of a backbone from the names of other libraries to those of timm

The tables of names are in `names/`. If timm's `checkpoint_filter_fn` reads the original names of an architecture, a row
leads to the original names and the filter does the rest.
"""

import re
from typing import Dict, Iterable, Iterator, Tuple

import torch

from .names import RENAMES
from .names.rename import Rename, blocks_by_stage

# tensors that timm has as one: the first part, the others, and the name of the whole
_FUSED = (
    (re.compile(r'(^|.*\.)attn\.query\.(weight|bias)$'), ('query', 'key', 'value'), 'qkv'),
    (re.compile(r'(^|.*\.)attn\.key\.(weight|bias)$'), ('key', 'value'), 'kv'),
    (re.compile(r'(^|.*\.)mlp\.gate_proj\.(weight|bias)$'), ('gate_proj', 'up_proj'), 'w12'),
)


def fuse(parts: Tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Create a placeholder for the concatenation of tensors.

    The placeholder is a tensor without memory (on the meta device) that keeps the tensors as its attribute `parts`.
    They are concatenated only when they are copied into the model, so the file is not copied into memory before.
    """
    fused = torch.empty((sum(p.shape[0] for p in parts), *parts[0].shape[1:]), dtype=parts[0].dtype, device='meta')
    fused.parts = parts  # type: ignore[attr-defined]  # torch allows further attributes, its types do not list them
    return fused


def apply_rename(
    rename: Rename, tensors: Dict[str, torch.Tensor], names: Iterable[str] = ()
) -> Dict[str, torch.Tensor]:
    """Rename all keys, and fuse query, key and value into the one tensor that timm has for them.

    Args:
        rename: Row of RENAMES.
        tensors: Tensors of the backbone by their names in the file.
        names: Names of the tensors of the model, whose stages are followed if the row asks for that.
    """
    renamed: Dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key
        for pattern, replacement in rename.steps:
            name = re.sub(pattern, replacement, name)
        # timm resizes position embeddings with a batch dimension, which those of CLIP lack
        renamed[key if name in renamed else name] = value[None] if name == 'pos_embed' and value.ndim == 2 else value
    for first, parts, whole in _FUSED:
        for key in [key for key in renamed if first.match(key)]:
            start, end = key.rsplit(f'{parts[0]}.', 1)
            found = [name for part in parts if (name := f'{start}{part}.{end}') in renamed]
            if len(found) == len(parts) and len({renamed[name].shape[1:] for name in found}) == 1:
                renamed[f'{start}{whole}.{end}'] = fuse(tuple(renamed.pop(name) for name in found))
            elif end == 'bias' and found == [f'{start}query.bias', f'{start}value.bias']:  # the keys have no bias
                renamed.update({f'{start}{name[len(start)]}_bias': renamed.pop(name) for name in found})
    for convert in rename.convert:
        renamed = convert(renamed)
    return blocks_by_stage(renamed, names) if rename.in_stages else renamed


def renames_for(tensors: Dict[str, torch.Tensor]) -> Iterator[Rename]:
    """Renames whose marker matches one of the keys. They are looked for as they are asked for: most files need none."""
    keys = '\n'.join(tensors)
    yield from (r for r in RENAMES if re.search(f'^({r.marker})', keys, re.MULTILINE))
