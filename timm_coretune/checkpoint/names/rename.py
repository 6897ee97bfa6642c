"""A row of the tables of names, and the changes of tensors that a row may ask for"""

import math
import re
from typing import Callable, Dict, Iterable, NamedTuple, Tuple, Union

import torch

Tensors = Dict[str, torch.Tensor]
Step = Tuple[str, Union[str, Callable[['re.Match[str]'], str]]]


class Rename(NamedTuple):
    """How one library names the tensors of one architecture.

    Attributes:
        name: Name of the row, for the report.
        marker: Regular expression for a key that only such a state dict has.
        steps: Regular expressions with their replacements. All are applied to each key, in this order.
        convert: Functions from all tensors by their new names to all tensors, for what renaming alone cannot do. They
            return views of the tensors, or leave tensors out, so that the file is not copied into memory.
        in_stages: Whether the blocks, which are numbered in a row by then, are to be numbered by stage as the model
            has them. Widths do not show where each stage begins: those of two stages may be the same.
        from_tensorflow: Whether the weights were made for the BatchNorm and the padding of TensorFlow.
    """

    name: str
    marker: str
    steps: Tuple[Step, ...]
    convert: Tuple[Callable[[Tensors], Tensors], ...] = ()
    in_stages: bool = False
    from_tensorflow: bool = False


def numbered(before: str, after: str = '', plus: int = 1) -> Callable[['re.Match[str]'], str]:
    """Replacement that counts on: the last number of the match, plus `plus`, between two templates."""

    def replace(match: 're.Match[str]') -> str:
        return match.expand(before) + str(int(match.groups()[-1]) + plus) + match.expand(after)

    return replace


def split_pooling(tensors: Tensors) -> Tensors:
    """Split the projections of a `torch.nn.MultiheadAttention` with a latent query as timm's attention pooling does."""
    changed = {}
    for key, tensor in tensors.items():
        end = key.removeprefix('attn_pool.in_proj_')
        if end == key:
            changed[key] = tensor
            continue
        width = tensor.shape[0] // 3
        changed[f'attn_pool.q.{end}'], changed[f'attn_pool.kv.{end}'] = tensor[:width], tensor[width:]
    return changed


def as_convolution(tensors: Tensors) -> Tensors:
    """Turn a linear projection of flat patches, whose channels come last, into a convolution."""
    weight = tensors.get('patch_embed.proj.weight')
    if weight is None or weight.ndim != 2:
        return tensors
    size = math.isqrt(weight.shape[1] // 3)
    if weight.shape[1] != 3 * size**2:
        return tensors
    return {**tensors, 'patch_embed.proj.weight': weight.unflatten(1, (size, size, 3)).permute(0, 3, 1, 2)}


def bias_of_query_and_value(tensors: Tensors) -> Tensors:
    """Split the bias of query, key and value as a Swin V2 of timm has it. That of the keys is zero in such networks."""
    changed = {}
    for key, tensor in tensors.items():
        start = key.removesuffix('qkv.bias')
        if start == key:
            changed[key] = tensor
            continue
        width = tensor.shape[0] // 3
        changed[f'{start}q_bias'], changed[f'{start}v_bias'] = tensor[:width], tensor[2 * width :]
    return changed


def share_table(tensors: Tensors) -> Tensors:
    """Give each block the table of relative positions that all blocks share, as the authors of BEiT do to fine-tune."""
    shared = 'rel_pos_bias.relative_position_bias_table'
    changed = {key: tensor for key, tensor in tensors.items() if key != shared}
    blocks = {match[0] for key in tensors if (match := re.match(r'blocks\.\d+\.', key))}
    changed.update({f'{block}attn.relative_position_bias_table': tensors[shared] for block in blocks})
    return changed


def without_zero_biases(tensors: Tensors) -> Tensors:
    """Leave out biases of query and value that are all zero. timm's DINOv3 models exist without such biases."""
    biases = {key: tensor for key, tensor in tensors.items() if key.endswith(('.attn.q_bias', '.attn.v_bias'))}
    if any(bool(tensor.count_nonzero()) for tensor in biases.values()):
        return tensors
    return {key: tensor for key, tensor in tensors.items() if key not in biases}


def blocks_in_a_row(tensors: Tensors) -> Tensors:
    """Number the blocks of all stages in a row, as timm's Hiera has them."""
    places = {key: match for key in tensors if (match := re.match(r'stages\.(\d+)\.layers\.(\d+)\.', key))}
    numbers = {(int(match[1]), int(match[2])) for match in places.values()}
    position = {number: i for i, number in enumerate(sorted(numbers))}
    changed = {}
    for key, tensor in tensors.items():
        place = places.get(key)
        changed[f'blocks.{position[int(place[1]), int(place[2])]}.{key[place.end() :]}' if place else key] = tensor
    return changed


def blocks_by_stage(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """Number blocks, which the file has in a row, by stage as a model has them: the reverse of `blocks_in_a_row`.

    Args:
        tensors: Tensors of the file. Blocks beyond the last one of the model keep their names.
        names: Names of the tensors of the model.
    """
    found = (re.match(r'blocks\.(\d+)\.(\d+)\.', name) for name in names)
    places = sorted({(int(match[1]), int(match[2])) for match in found if match})
    changed = {}
    for key, tensor in tensors.items():
        match = re.match(r'blocks\.(\d+)\.', key)
        if match and int(match[1]) < len(places):
            stage, block = places[int(match[1])]
            key = f'blocks.{stage}.{block}.{key[match.end() :]}'
        changed[key] = tensor
    return changed
