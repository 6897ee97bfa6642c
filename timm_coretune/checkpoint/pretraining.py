"""What the shapes of a file do not show: heads of the attention, the activation, how images were normalized"""

from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.layers import QuickGELU

from .mapping import Mapping
from .rules import IMAGENET

Configs = Dict[str, Any]


def _section(config: Configs, *names: str) -> Dict[str, Any]:
    """A dictionary inside the configs, empty where there is none."""
    for name in names:
        config = config.get(name)
        if not isinstance(config, dict):
            return {}
    return config


def _vision(config: Configs) -> Dict[str, Any]:
    """What config.json says of the image tower."""
    return _section(config, 'config.json', 'vision_config') or _section(config, 'config.json')


def _num_heads(model: nn.Module) -> int:
    block = next(iter(getattr(model, 'blocks', ())), None)
    return getattr(getattr(block, 'attn', None), 'num_heads', 0)


def _is_quick_gelu(model: nn.Module) -> bool:
    return any(isinstance(m, QuickGELU) for m in model.modules())


def contradictions(mapping: Mapping, model: nn.Module, config: Configs) -> List[str]:
    """Why a model computes something else than the network that was trained, though all shapes agree."""
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


def _trained_with_quick_gelu(mapping: Mapping, config: Configs) -> Any:
    """True, False, or None where neither the layout nor a config tells."""
    activation = _vision(config).get('hidden_act')
    if activation:
        return activation == 'quick_gelu'
    open_clip = _section(config, 'open_clip_config.json', 'model_cfg')
    if open_clip:
        return bool(open_clip.get('quick_gelu'))
    return mapping.rule.quick_gelu


def unknowns(mapping: Mapping, model: nn.Module, config: Configs) -> List[str]:
    """What the user has to know, as neither the layout of the file nor a config tells it."""
    if 'CLIP' in mapping.rule.method and _trained_with_quick_gelu(mapping, config) is None:
        activation = 'QuickGELU' if _is_quick_gelu(model) else 'another activation'
        return [f'the file does not tell whether it was trained with QuickGELU, as weights of OpenAI are; this model '
                f'has {activation}']  # fmt: skip
    return []


def _numbers(value: Any) -> Tuple[float, ...]:
    """A value for each channel, empty where there is none."""
    try:
        return tuple(float(number) for number in (value.split() if isinstance(value, str) else value or ()))
    except (TypeError, ValueError):
        return ()


def normalization(mapping: Mapping, config: Configs) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and std of the pretraining: what the checkpoint itself says, else the method's, else empty."""
    for section, names in (
        (('metadata',), ('mean', 'std')),  # of safetensors, as numbers with spaces between
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
    """Mean, std and input size of the pretraining, as far as they are known."""
    found: Configs = {}
    mean, std = normalization(mapping, config)
    if mean and len(mean) == getattr(model, 'pretrained_cfg', {}).get('input_size', (3,))[0]:
        found.update(mean=mean, std=std)
    size = trained_size(model, file_tensors)
    if size:
        found['input_size'] = (3, size, size)
    return found


def trained_size(model: nn.Module, file_tensors: Dict[str, torch.Tensor]) -> int:
    """Side of the pretraining images from the number of position embeddings in the file, 0 where it does not tell."""
    patch_size = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    names = ('pos_embed', 'positional_embedding', 'position_embeddings', 'position_embedding.weight')
    tokens = next((t.shape[-2] for key, t in file_tensors.items() if key.endswith(names) and t.ndim in (2, 3)), 0)
    for extra in (1, 0, 2):  # a class token, none, or one for distillation beside it
        side = round((tokens - extra) ** 0.5) if tokens > extra else 0
        if patch_size and side and side * side == tokens - extra:
            return side * patch_size[0]
    return 0


def write_data_config(model: nn.Module, found: Configs) -> List[str]:
    """Tell the model's input to `timm.data.resolve_model_data_config`, and return what the user should know."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict):
        return []
    notes = []
    known = {key: found[key] for key in ('mean', 'std') if key in found}
    old = tuple(cfg.get('mean') or IMAGENET_DEFAULT_MEAN)
    if known and tuple(known['mean']) != old:
        notes.append(f'images are to be normalized with mean {known["mean"]} and std {known["std"]}, not mean {old}')
    if not known and old != IMAGENET_DEFAULT_MEAN:
        notes.append(f'the file does not tell how images were normalized, the mean {old} of the timm model is kept')
    if 'input_size' in found:
        built = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
        if built and tuple(built) != found['input_size'][1:]:
            notes.append(
                f'pretrained at {found["input_size"][1]} px, the model is built for {built[0]} px: '
                'its position embeddings are resized'
            )
        else:
            known['input_size'] = found['input_size']
    model.pretrained_cfg = {**cfg, **known}
    return notes
