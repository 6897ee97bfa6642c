"""Arguments of a timm model that have to change for a checkpoint to fit, read from the shapes of both"""

import inspect
from typing import Any, Dict, FrozenSet, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import to_2tuple

from ...timm_model import Target
from ..differences import first_num_heads
from ..mapping import Mapping
from ..pretraining import built_patch_size, position_count, trained_patch_size
from ..renames import apply_rename, renames_for
from .facts import Facts, Shapes, grid, read_facts, swin_image

Arguments = Dict[str, Any]
# Names of an argument in the classes of timm, where they are not that of the fact
_NAMES = {
    'reg_tokens': ('reg_tokens', 'num_reg_tokens'),
    'init_values': ('init_values', 'ls_init_value'),
    'pre_norm': ('pre_norm', 'use_pre_transformer_norm'),
    'scale_attn_norm': ('scale_attn_norm', 'scale_attn_inner'),
    'scale_mlp_norm': ('scale_mlp_norm', 'scale_mlp'),
    'fc_norm': ('fc_norm', 'use_fc_norm'),
    'no_embed_class': ('no_embed_class',),
}
# Any value but 0 creates the parameters of the layer scale, and the file has their values
_LAYER_SCALE = {'init_values': 1e-5, 'ls_init_value': 1e-6}
# Facts that another function turns into arguments
_ELSEWHERE = ('embed_dim', 'num_heads', 'class_token', 'windows', 'bottleneck')
MOST_BLOCKS = 256  # a model is not built for a file with more blocks: no network has them
# Arguments of the user that stay as they are, for what they change is resized or sliced on loading
RESIZABLE = ('img_size', 'patch_size', 'window_size')


class Reading(NamedTuple):
    """A file and a model whose facts are compared.

    Attributes:
        mapping: The file, read for the model.
        source: Tensors of the backbone by their names in the file, without the prefix.
        target: The model.
        num_heads: Number of attention heads that a config or the format tells, None if neither does.
        activation: timm's name of the activation that they tell, if the model has another one, else None.
        fixed: Names of arguments that stay as they are.
    """

    mapping: Mapping
    source: Dict[str, torch.Tensor]
    target: Target
    num_heads: Optional[int] = None
    activation: Optional[str] = None
    fixed: FrozenSet[str] = frozenset()

    @property
    def shapes(self) -> Shapes:
        """Shapes in the file by the names of the file and by those that timm gives.

        timm's filter resizes some tensors. Of these it is the shape in the file that counts.
        """
        rename = next((r for r in renames_for(self.source) if self.mapping.names.startswith(r.name)), None)
        renamed = apply_rename(rename, self.source) if rename else self.source
        tensors = {**self.source, **self.mapping.named, **renamed}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class Change(NamedTuple):
    """Arguments that have to change.

    Attributes:
        arguments: Their names and values.
        assumed: What they assume that no shape shows, '' if they assume nothing.
    """

    arguments: Arguments
    assumed: str = ''


def parameters_of(model: nn.Module) -> FrozenSet[str]:
    """Names of the arguments that the class of a model takes."""
    names = set()
    for cls in type(model).__mro__:
        if '__init__' in vars(cls):
            parameters = inspect.signature(vars(cls)['__init__']).parameters
            names |= set(parameters)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return frozenset(names - {'self', 'args', 'kwargs'})


def shown_arguments(reading: Reading) -> Change:
    """Arguments of the model that differ from what the file shows, none if nothing differs or nothing is shown."""
    model = reading.target.model
    file, built = read_facts(reading.shapes), read_facts(reading.target.shapes)
    found: Arguments = _channels(reading)
    if reading.activation:
        found['act_layer'] = reading.activation
    assumed = ''
    if file and built and file.keys() & built.keys():
        for fact in file.keys() & built.keys():
            if fact not in _ELSEWHERE and file[fact] != built[fact]:
                found[fact] = file[fact]
        width, assumed = _width(reading, file, built)
        found.update(width)
        if 'windows' in file:
            found.update(_windows(model, file, built))
        elif 'depth' in file:
            found.update(_tokens(reading, file))
    takes = parameters_of(model)
    arguments: Arguments = {}
    for fact, value in sorted(found.items()):
        name = next((name for name in _NAMES.get(fact, (fact,)) if name in takes), None)
        if name is None or name in reading.fixed:
            continue
        if name in _LAYER_SCALE:
            value = _LAYER_SCALE[name] if value else 0
        arguments[name] = value
    too_deep = any(_total(arguments.get(name)) > MOST_BLOCKS for name in ('depth', 'depths', 'layers'))
    return Change({}) if too_deep else Change(arguments, assumed)


def _total(depth: Any) -> int:
    return sum(depth) if isinstance(depth, tuple) else depth or 0


def _channels(reading: Reading) -> Arguments:
    """Number of channels of the images of the file, unless its first convolution can be adapted to the model."""

    def first(shapes: Shapes, name: str) -> Tuple[int, ...]:
        return tuple(shapes.get(f'{name}.weight', shapes.get(f'{name}.0.weight', ())))  # a deep stem has several

    for name in reading.target.first_conv:
        shape, own = first(reading.shapes, name), first(reading.target.shapes, name)
        if len(shape) == len(own) == 4 and shape[1] not in (3, own[1]):
            return {'in_chans': shape[1]}
    return {}


def _width(reading: Reading, file: Facts, built: Facts) -> Tuple[Arguments, str]:
    """Width of a transformer and its number of attention heads, and what this number assumes."""
    found: Arguments = {}
    if 'num_heads' in file and file['num_heads'] != built.get('num_heads'):
        found['num_heads'] = file['num_heads']
    if 'embed_dim' not in file or file['embed_dim'] == built.get('embed_dim'):
        return found, ''
    found['embed_dim'] = width = file['embed_dim']
    if 'num_heads' in file:
        return {**found, 'num_heads': file['num_heads']}, ''
    if reading.num_heads:
        return {**found, 'num_heads': reading.num_heads}, ''
    heads = first_num_heads(reading.target.model)
    head_width = built['embed_dim'] // heads if heads and 'embed_dim' in built else 0
    if not head_width or width % head_width:
        return {}, ''
    count = width // head_width
    assumed = f'no shape shows the number of attention heads, and num_heads={count} makes each {head_width} wide'
    return {**found, 'num_heads': count}, assumed


def _windows(model: Any, file: Facts, built: Facts) -> Arguments:
    """Size of the windows of a Swin, and a size of the image for which no window is cut."""
    windows = file['windows']
    if windows == built.get('windows') or not all(windows):
        return {}
    size = swin_image(windows, file.get('patch_size', (built_patch_size(model) or (4,))[0]))
    return {'window_size': windows[0], **_image(model, size)}


def _image(model: Any, size: int) -> Arguments:
    """Size of the image, if the model is built for another."""
    built = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    return {'img_size': size} if built and to_2tuple(built) != (size, size) else {}


def _tokens(reading: Reading, facts: Facts) -> Arguments:
    """Tokens, position embeddings, patches and final norm of a ViT."""
    shapes, target, model = reading.shapes, reading.target, reading.target.model
    found: Arguments = {}
    pools = 'map' if 'attn_pool.latent' in shapes else 'avg'
    if pools == 'map' and 'attn_pool.latent' not in target.shapes:
        found['global_pool'] = 'map'
    by_token = getattr(model, 'global_pool', '') == 'token'
    has_norm, has_fc_norm = 'norm.weight' in shapes, 'fc_norm.weight' in shapes
    if facts['class_token'] != ('cls_token' in target.shapes):
        found['class_token'] = facts['class_token']
        if not facts['class_token'] and by_token:
            found['global_pool'] = pools
            if has_norm and pools == 'avg':
                found['fc_norm'] = False
    if has_fc_norm and not has_norm and 'norm.weight' in target.shapes:
        found.update({'global_pool': 'avg'} if by_token else {'fc_norm': True})
    if not has_fc_norm and not has_norm and {'norm.weight', 'fc_norm.weight'} & target.shapes.keys():
        found['final_norm'] = False
    patch, own_patch = trained_patch_size(reading.source), built_patch_size(model)
    if patch and own_patch and patch != own_patch:
        found['patch_size'] = patch[0] if patch[0] == patch[1] else patch
    keeps_patch = 'patch_size' in reading.fixed and patch != own_patch
    found.update(_positions(reading, facts, 0 if keeps_patch or not patch or patch[0] != patch[1] else patch[0]))
    return found


def _positions(reading: Reading, facts: Facts, patch: int) -> Arguments:
    """Whether there are position embeddings, for which tokens, and the size of the image that they are for."""
    shapes, model = reading.shapes, reading.target.model
    positions, has_positions = position_count(reading.source), 'pos_embed' in reading.target.shapes
    found: Arguments = {}
    if bool(positions) != has_positions:
        found = {'pos_embed': 'learn' if positions else 'none', 'use_abs_pos_emb': bool(positions)}
    prefix = int(facts['class_token']) + facts['reg_tokens'] + int('dist_token' in shapes)
    embeds_none = bool(getattr(model, 'no_embed_class', False))
    # the authors of DINOv2 add a position to the class token, which timm's filter folds into it, but none to registers
    folded = 'register_tokens' in shapes
    side, others = grid(positions, (1,) if folded else (0, prefix) if embeds_none else (prefix, 0))
    if side and prefix and (folded or not others) != embeds_none:
        found['no_embed_class'] = folded or not others
    table = shapes.get('blocks.0.attn.relative_position_bias_table', ())
    if not side and len(table) == 2:  # BEiT has three rows more, of the class token
        odd = grid(table[0], (3,))[0]
        side = (odd + 1) // 2 if odd % 2 else 0
    if side and patch:
        found.update(_image(model, side * patch))
    return found
