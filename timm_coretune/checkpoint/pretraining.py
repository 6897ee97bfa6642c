"""Facts of the pretraining that shapes do not show: number of attention heads, activation, image normalization"""

import re
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.layers import QuickGELU

from ..run_folder import PREPROCESSING
from .mapping import Mapping
from .rules import IMAGENET

Configs = Dict[str, Any]
_PATCHES = re.compile(
    r'(^|\.)(patch_embed\.proj|patch_embed\.projection|patch_embeddings\.projection|patch_embedding|conv1)\.weight$'
)


def _section(config: Configs, *names: str) -> Dict[str, Any]:
    """The dictionary that a path of keys leads to inside the configs, empty if there is none."""
    section: Any = config
    for name in names:
        section = section.get(name)
        if not isinstance(section, dict):
            return {}
    return section


def _vision(config: Configs) -> Dict[str, Any]:
    """The part of config.json about the image encoder. CLIP models have a section for it, others do not."""
    return _section(config, 'config.json', 'vision_config') or _section(config, 'config.json')


def _num_heads(model: nn.Module) -> int:
    """Number of attention heads of a ViT, 0 for other models."""
    block = next(iter(getattr(model, 'blocks', ())), None)
    return getattr(getattr(block, 'attn', None), 'num_heads', 0)


def _is_quick_gelu(model: nn.Module) -> bool:
    return any(isinstance(m, QuickGELU) for m in model.modules())


def contradictions(mapping: Mapping, model: nn.Module, config: Configs) -> List[str]:
    """Errors for a model that differs from the pretrained network although all shapes agree.

    Such a model would load without complaint, but compute something else than the pretrained network.
    """
    found = []
    heads = _num_heads(model)
    width = getattr(model, 'embed_dim', 0)
    trained_heads = _vision(config).get('num_attention_heads') or dict(mapping.rule.heads).get(width)
    if heads and isinstance(trained_heads, int) and trained_heads != heads:
        found.append(
            f'The network was trained with {trained_heads} attention heads, this model has {heads}: create it with '
            f'num_heads={trained_heads} (train.py: --model-kwargs num_heads={trained_heads}).'
        )
    quick_gelu = _trained_with_quick_gelu(mapping, config)
    if quick_gelu is not None and quick_gelu != _is_quick_gelu(model):
        if quick_gelu:
            found.append(
                'The network was trained with QuickGELU, this model has another activation: take the timm model with '
                "'quickgelu' in its name (vit_base_patch32_clip_quickgelu_224), or act_layer='quick_gelu'."
            )
        else:
            found.append(
                'The network was trained with GELU, this model has QuickGELU: take the timm model without '
                "'quickgelu' in its name."
            )
    return found


def _trained_with_quick_gelu(mapping: Mapping, config: Configs) -> Optional[bool]:
    """Whether the network was trained with QuickGELU, None if neither a config nor the format of the file tells."""
    activation = _vision(config).get('hidden_act')
    if activation:
        return activation == 'quick_gelu'
    open_clip = _section(config, 'open_clip_config.json', 'model_cfg')
    if open_clip:
        return bool(open_clip.get('quick_gelu'))
    return mapping.rule.quick_gelu


def unknowns(mapping: Mapping, model: nn.Module, config: Configs) -> List[str]:
    """Notes about facts that neither the format of the file nor a config tells, so the user has to check them."""
    if 'CLIP' in mapping.rule.method and _trained_with_quick_gelu(mapping, config) is None:
        activation = 'QuickGELU' if _is_quick_gelu(model) else 'another activation'
        return [f'the file does not tell whether it was trained with QuickGELU, as the weights of OpenAI were; '
                f'this model has {activation}']  # fmt: skip
    return []


def _numbers(value: Any) -> Tuple[float, ...]:
    """Numbers for the channels of the image from a list, or from text with spaces. Empty if they cannot be read."""
    try:
        return tuple(float(number) for number in (value.split() if isinstance(value, str) else value or ()))
    except (TypeError, ValueError):
        return ()


def normalization(mapping: Mapping, config: Configs) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and std of the pretraining images.

    They are taken from the checkpoint or the configs beside it, else from the rule of the method. Both are empty if
    they are not known.
    """
    for section, names in (
        (('metadata',), ('mean', 'std')),  # of a safetensors file, numbers separated by spaces
        (('open_clip_config.json', 'preprocess_cfg'), ('mean', 'std')),
        (('preprocessor_config.json',), ('image_mean', 'image_std')),
        (('config.json', 'pretrained_cfg'), ('mean', 'std')),
    ):
        mean, std = (_numbers(_section(config, *section).get(name)) for name in names)
        if mean and std:
            return mean, std
    if 'release' in config:
        return IMAGENET
    return mapping.rule.normalization or ((), ())


def data_config(mapping: Mapping, model: nn.Module, file_tensors: Dict[str, torch.Tensor], config: Configs) -> Configs:
    """Mean, std and input size of the pretraining images, as far as they are known, under timm's names."""
    found: Configs = {}
    mean, std = normalization(mapping, config)
    if mean and len(mean) == getattr(model, 'pretrained_cfg', {}).get('input_size', (3,))[0]:
        found.update(mean=mean, std=std)
    size = trained_size(model, file_tensors)
    if size:
        found['input_size'] = (3, size, size)
    return found


def trained_size(model: nn.Module, file_tensors: Dict[str, torch.Tensor]) -> int:
    """Side of the pretraining images in pixels, from the position embeddings and the patch projection in the file.

    Returns 0 if the file has none, or if the embeddings do not form a square.
    """
    built = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    patch_size = trained_patch_size(file_tensors) or built
    side = trained_grid(file_tensors)
    return side * patch_size[0] if patch_size and side else 0


def trained_grid(file_tensors: Dict[str, torch.Tensor]) -> int:
    """Number of patches along a side of the pretraining images, 0 if the file does not tell."""
    names = ('pos_embed', 'positional_embedding', 'position_embeddings', 'position_embedding.weight')
    tokens = next((t.shape[-2] for key, t in file_tensors.items() if key.endswith(names) and t.ndim in (2, 3)), 0)
    for extra in (1, 0, 2):  # tokens beside the patches: class token; none; class and distillation token
        side = round((tokens - extra) ** 0.5) if tokens > extra else 0
        if side and side * side == tokens - extra:
            return side
    return 0


def patch_projection(file_tensors: Dict[str, torch.Tensor]) -> Optional[torch.Tensor]:
    """Weight of the convolution that embeds the patches of a ViT, None if the file has none."""
    return next((t for key, t in file_tensors.items() if _PATCHES.search(key) and t.ndim in (4, 5)), None)


def trained_patch_size(file_tensors: Dict[str, torch.Tensor]) -> Optional[Tuple[int, int]]:
    """Height and width of a patch of the pretrained ViT, None if the file does not tell."""
    projection = patch_projection(file_tensors)
    return None if projection is None else (projection.shape[-2], projection.shape[-1])


def resampled_patches(model: nn.Module, file_tensors: Dict[str, torch.Tensor]) -> List[str]:
    """Note about patches of another size than those of the model: the projection computes other values then."""
    patch_embed = getattr(model, 'patch_embed', None)
    built, trained = getattr(patch_embed, 'patch_size', None), trained_patch_size(file_tensors)
    if not built or trained is None or tuple(built) == trained:
        return []
    note = (
        f'pretrained with patches of {trained[0]} px, the model has patches of {built[0]} px: the patch projection is '
        'resampled'
    )
    side, grid = trained_grid(file_tensors), getattr(patch_embed, 'grid_size', None)
    if side and grid and tuple(grid) != (side, side):
        note += f', and position embeddings are resized from {side} x {side} to {grid[0]} x {grid[1]}'
    return [f'{note}. --model-kwargs patch_size={trained[0]} avoids that']


def write_data_config(
    model: nn.Module, found: Configs, described: bool = False, resized: Tuple[str, ...] = ()
) -> List[str]:
    """Write the data config of the pretraining to the model, where `timm.data.resolve_model_data_config` finds it.

    Args:
        model: Model whose `pretrained_cfg` is replaced.
        found: Result of `data_config`.
        described: Whether the values are those that a config.json of this very model says. They need no notes.
        resized: Names of the tensors that were resized.

    Returns:
        Notes for the user.
    """
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict):
        return []
    notes = []
    keys = [key for key in PREPROCESSING if key != 'input_size'] if described else ['mean', 'std']
    known: Configs = {key: found[key] for key in keys if key in found}
    old = tuple(cfg.get('mean') or IMAGENET_DEFAULT_MEAN)
    if not described and known and tuple(known['mean']) != old:
        notes.append(f'images are to be normalized with mean {known["mean"]} and std {known["std"]}, not mean {old}')
    if not described and not known and old != IMAGENET_DEFAULT_MEAN:
        notes.append(f'the file does not tell how images were normalized: the mean {old} of the timm model is kept')
    if 'input_size' in found:
        size = tuple(found['input_size'])[1:]
        built = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
        if built and tuple(built) != size:
            is_resized = any(name.endswith('pos_embed') for name in resized)
            notes.append(
                f'pretrained at {size[0]} px, the model is built for {built[0]} px'
                f'{": its position embeddings are resized" if is_resized else ""}'
            )
        else:
            known['input_size'] = ((cfg.get('input_size') or (3,))[0], *size)
    if described:  # what timm would use in place of these values for tests, and a fact about the old size
        cfg = {key: value for key, value in cfg.items() if key not in ('test_input_size', 'test_crop_pct')}
        if 'input_size' in known and tuple(known['input_size']) != tuple(cfg.get('input_size') or ()):
            cfg['pool_size'] = None
    model.pretrained_cfg = {**cfg, **known}  # type: ignore[assignment]  # nn.Module types attributes as tensors
    return notes
