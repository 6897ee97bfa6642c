"""Facts about a network that the names and shapes of its tensors show: depth, layer scale, register tokens, groups

The same functions read the tensors of a file and those of a model. Where the facts differ, an argument of the timm
model has to change, see `arguments.py`. The names are those of timm, with a few that other libraries use for the same
thing.
"""

import re
from collections import Counter
from typing import Any, Callable, Dict, List, Mapping, Tuple

Shapes = Mapping[str, Tuple[int, ...]]
Facts = Dict[str, Any]


def _counts(shapes: Shapes, pattern: str) -> Tuple[int, ...]:
    """Number of blocks of each stage. The groups of the pattern are the number of the stage and of the block.

    Names of more than a few digits are no numbers of blocks: a file that is not trusted can have any.
    """
    found = {m.groups() for name in shapes if (m := re.match(pattern, name)) and max(map(len, m.groups())) < 5}
    counts = Counter(int(stage) for stage, _ in found)
    return tuple(counts[stage] for stage in sorted(counts))


def _side(size: float) -> int:
    """The whole number whose square a size is, 0 if there is none."""
    side = round(size**0.5) if size > 0 else 0
    return side if side * side == size else 0


def _window(rows: int) -> int:
    """Side of the window whose relative positions a table of so many rows holds, 0 if there is none."""
    side = _side(rows)
    return (side + 1) // 2 if side % 2 else 0


def _mlp_ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _of_block(shapes: Shapes, block: str) -> Facts:
    """Facts of a transformer block: its width, its biases, norms and layer scale."""

    def has(*names: str) -> bool:
        return any(block + name in shapes for name in names)

    facts: Facts = {
        'qkv_bias': has('attn.qkv.bias', 'attn.q_bias', 'attn.q_proj.bias'),
        'qk_norm': has('attn.q_norm.weight'),
        'proj_bias': has('attn.proj.bias'),
        'scale_attn_norm': has('attn.norm.weight'),
        'scale_mlp_norm': has('mlp.norm.weight'),
        'init_values': has('ls1.gamma', 'gamma_1'),
        'use_rel_pos_bias': has('attn.relative_position_bias_table'),
    }
    width, hidden = shapes.get(f'{block}norm1.weight', ()), shapes.get(f'{block}mlp.fc1.weight', ())
    if len(width) == 1 and width[0]:
        facts['embed_dim'] = width[0]
        if hidden:
            facts['mlp_ratio'] = _mlp_ratio(hidden[0], width[0])
    return facts


def of_vit(shapes: Shapes) -> Facts:
    """Facts of a ViT, and of BEiT, EVA and DINOv3, whose blocks have the same names."""
    depth = len({m[1] for name in shapes if (m := re.match(r'blocks\.(\d{1,4})\.', name))})
    if not depth or 'blocks.0.norm1.weight' not in shapes:
        return {}
    registers = next((shapes[k] for k in ('reg_token', 'register_tokens', 'storage_tokens') if k in shapes), ())
    table = shapes.get('blocks.0.attn.relative_position_bias_table', ())
    facts = {
        **_of_block(shapes, 'blocks.0.'),
        'depth': depth,
        'class_token': 'cls_token' in shapes,
        'reg_tokens': registers[-2] if len(registers) > 1 else 0,
        'pre_norm': 'norm_pre.weight' in shapes,
        'use_shared_rel_pos_bias': 'rel_pos_bias.relative_position_bias_table' in shapes,
    }
    if len(table) == 2:
        facts['num_heads'] = table[1]
    return facts


def of_swin(shapes: Shapes) -> Facts:
    """Facts of a Swin. Its tables of relative positions show the numbers of heads and the sizes of windows."""
    depths = _counts(shapes, r'layers\.(\d+)\.blocks\.(\d+)\.')
    tables = [
        shapes.get(f'layers.{stage}.blocks.0.attn.relative_position_bias_table', ()) for stage in range(len(depths))
    ]
    if not depths or not all(len(table) == 2 for table in tables):
        return {}
    block = _of_block(shapes, 'layers.0.blocks.0.')
    kept: Facts = {key: block[key] for key in ('embed_dim', 'mlp_ratio', 'qkv_bias') if key in block}
    return {
        **kept,
        'depths': depths,
        'num_heads': tuple(table[1] for table in tables),
        'windows': tuple(_window(table[0]) for table in tables),
        **_patch_of(shapes, 'patch_embed.proj.weight'),
    }


def _patch_of(shapes: Shapes, *names: str) -> Facts:
    """Side of the patches that a convolution without overlap cuts an image into."""
    shape = next((shapes[name] for name in names if name in shapes), ())
    return {'patch_size': shape[-1]} if len(shape) == 4 and shape[-1] == shape[-2] else {}


def of_convnext(shapes: Shapes) -> Facts:
    """Facts of a ConvNeXt, by timm's names or by those of its authors."""
    depths = _counts(shapes, r'stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:conv_dw|dwconv)\.weight')

    def first(*names: str) -> List[Tuple[int, ...]]:
        """Shapes in the first block of each stage, of the tensor that has one of these names."""
        found = []
        for stage in range(len(depths)):
            keys = [f'stages.{stage}.{part}0.{name}' for part in ('blocks.', '') for name in names]
            found += [shapes[key] for key in keys if key in shapes][:1]
        return found

    convolutions = first('conv_dw.weight', 'dwconv.weight')
    if not depths or len(convolutions) != len(depths) or any(len(shape) != 4 for shape in convolutions):
        return {}
    kernels = tuple(shape[-1] for shape in convolutions)
    facts: Facts = {
        'depths': depths,
        'dims': tuple(shape[0] for shape in convolutions),
        'kernel_sizes': kernels[0] if len(set(kernels)) == 1 else kernels,
        'conv_bias': bool(first('conv_dw.bias', 'dwconv.bias')),
        'init_values': bool(first('gamma')),
        'use_grn': bool(first('mlp.grn.weight', 'grn.gamma')),
        'head_norm_first': 'norm_pre.weight' in shapes,
    }
    return {**facts, **_patch_of(shapes, 'stem.0.weight', 'downsample_layers.0.0.weight')}


def of_resnet(shapes: Shapes) -> Facts:
    """Facts of a ResNet or ResNeXt: its depth, groups, and stem."""
    layers = _counts(shapes, r'layer(\d+)\.(\d+)\.conv1\.weight')
    middle, last = (shapes.get(f'layer1.0.conv{n}.weight', ()) for n in (2, 3))
    if not layers or len(middle) != 4:
        return {}
    facts: Facts = {'layers': layers, 'bottleneck': bool(last)}
    if len(last) == 4 and middle[1] and last[0] >= 4:
        groups = middle[0] // middle[1]
        planes = last[0] // 4
        facts['cardinality'] = groups
        facts['base_width'] = 64 * middle[0] // (groups * planes) if groups else 64
    stem = [shapes.get(f'conv1.{n}.weight', ()) for n in (0, 3)]
    facts['stem_type'] = ''
    if all(len(shape) == 4 for shape in stem):
        facts['stem_type'] = 'deep' if stem[0][0] == stem[1][0] else 'deep_tiered'
        facts['stem_width'] = stem[1][0]
    # a downsampling that averages first has its convolution one place later
    shortcut = next((s for n, s in sorted(shapes.items()) if re.match(r'layer\d\.0\.downsample\.\d\.weight', n)), None)
    if shortcut is not None:
        facts['avg_down'] = not any(re.match(r'layer\d\.0\.downsample\.0\.weight', name) for name in shapes)
    facts['block_args'] = {'attn_layer': 'se'} if any('.se.fc1.' in name for name in shapes) else {}
    return facts


FAMILIES: Tuple[Callable[[Shapes], Facts], ...] = (of_vit, of_swin, of_convnext, of_resnet)


def read_facts(shapes: Shapes) -> Facts:
    """Facts of a network of any of these families, empty if it is of none."""
    return next((facts for family in FAMILIES if (facts := family(shapes))), {})


def grid(positions: int, extra: Tuple[int, ...]) -> Tuple[int, int]:
    """Side of the square of patches that position embeddings are for, and the number of other tokens among them.

    Args:
        positions: Number of position embeddings.
        extra: Numbers of other tokens that there may be, the likeliest first.

    Returns:
        Side and number, (0, 0) if no number of `extra` leaves a square.
    """
    return next(((side, n) for n in extra if (side := _side(positions - n))), (0, 0))


def swin_image(windows: Tuple[int, ...], patch_size: int) -> int:
    """Side of the smallest images in pixels for which a Swin has windows of these sizes.

    timm makes the window of a stage as small as its feature map.
    """
    return max(window * patch_size * 2**stage for stage, window in enumerate(windows))
