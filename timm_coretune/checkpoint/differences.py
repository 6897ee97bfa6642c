"""Compare a model with the network that was trained: what changes the output although all shapes agree

The format of a file and a config tell numbers of attention heads and QuickGELU. The names of a file tell a network that
comes from TensorFlow.

Of transformers and open_clip each key that changes the output and no shape is compared. timm's own config names a model
and its arguments: this model is built without memory, and compared with the one that is to be filled.
"""

import re
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, QuickGELU
from timm.models import create_model, is_model

from ..model_config import describe_config
from ..run_folder import CONFIG_NAME
from .mapping import Mapping
from .names import RENAMES
from .reading.configs import reads_configs, section_of

Configs = Dict[str, Any]
TENSORFLOW_EPSILON = 1e-3  # default of BatchNorm in the networks that Google released
# names of transformers for an activation, and timm's name and the formula
_ACTIVATIONS: Dict[str, Tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    'gelu': ('gelu', F.gelu),
    'gelu_python': ('gelu', F.gelu),
    'gelu_new': ('gelu_tanh', lambda x: F.gelu(x, approximate='tanh')),
    'gelu_fast': ('gelu_tanh', lambda x: F.gelu(x, approximate='tanh')),
    'gelu_pytorch_tanh': ('gelu_tanh', lambda x: F.gelu(x, approximate='tanh')),
    'quick_gelu': ('quick_gelu', lambda x: x * torch.sigmoid(1.702 * x)),
    'relu': ('relu', F.relu),
    'relu6': ('relu6', F.relu6),
    'silu': ('silu', F.silu),
    'swish': ('silu', F.silu),
    'tanh': ('tanh', torch.tanh),
    'sigmoid': ('sigmoid', torch.sigmoid),
    'mish': ('mish', F.mish),
    'leaky_relu': ('leaky_relu', F.leaky_relu),
}
_NORMS = re.compile(r'((^|.*\.)norm[12]|norm|fc_norm|norm_pre|head\.norm)$')
# arguments of a timm model that the weights need not share, or that resize what is said to be resized
_FREE = ('img_size', 'in_chans', 'num_classes', 'global_pool', 'output_stride', 'patch_size', 'features_only')


def _vision(config: Configs) -> Dict[str, Any]:
    """The part of config.json about the image encoder. CLIP models have a section for it, others do not."""
    return section_of(config, 'config.json', 'vision_config') or section_of(config, 'config.json')


def first_num_heads(model: nn.Module) -> int:
    """Number of attention heads of the first block of a ViT, 0 for other models."""
    block = next(iter(getattr(model, 'blocks', ())), None)
    return getattr(getattr(block, 'attn', None), 'num_heads', 0)


def trained_num_heads(mapping: Mapping, width: int, config: Configs) -> Optional[int]:
    """Number of attention heads that a config or the format of the file tells, None if neither does.

    Args:
        mapping: The file.
        width: Width of the ViT.
        config: Contents of the JSON files beside the weights, by file name.
    """
    heads = _vision(config).get('num_attention_heads') or dict(mapping.rule.heads).get(width)
    return heads if isinstance(heads, int) else None


def _is_quick_gelu(model: nn.Module) -> bool:
    return any(isinstance(m, QuickGELU) for m in model.modules())


@reads_configs
def contradictions(mapping: Mapping, model: nn.Module, config: Configs) -> List[str]:
    """Errors for a model that differs from the pretrained network although all shapes agree.

    Such a model would load without complaint, but compute something else than the pretrained network.
    """
    found = []
    heads = first_num_heads(model)
    trained_heads = trained_num_heads(mapping, getattr(model, 'embed_dim', 0), config)
    if heads and trained_heads and trained_heads != heads:
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
    return found + _of_tensorflow(mapping, model)


def _of_tensorflow(mapping: Mapping, model: nn.Module) -> List[str]:
    """Whether a network from TensorFlow meets the BatchNorm and the padding that its weights were made for."""
    if not any(rename.from_tensorflow for rename in RENAMES if rename.name == mapping.names):
        return []
    epsilons = sorted(set(_batch_norm_epsilons(model)) - {TENSORFLOW_EPSILON})
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1]
    built = [f'an epsilon of {eps:g}' for eps in epsilons]
    if not all(isinstance(m, Conv2dSame) for m in strided):
        built.append('equal padding on all sides')
    if not built:
        return []
    return [
        f'The network was trained with an epsilon of {TENSORFLOW_EPSILON:g} in its BatchNorms and with the padding of '
        f"TensorFlow ('same'), this model has {' and '.join(built)}: take the timm model whose name starts with tf_ "
        '(tf_efficientnet_b0).'
    ]


def _trained_with_quick_gelu(mapping: Mapping, config: Configs) -> Optional[bool]:
    """Whether the network was trained with QuickGELU, None if neither a config nor the format of the file tells."""
    activation = _vision(config).get('hidden_act')
    if activation:
        return activation == 'quick_gelu'
    open_clip = section_of(config, 'open_clip_config.json', 'model_cfg')
    if open_clip:
        return bool(open_clip.get('quick_gelu'))
    return mapping.rule.quick_gelu


def other_activation(mapping: Mapping, model: nn.Module, config: Configs) -> Optional[str]:
    """timm's name of the activation that the network was trained with, None if the model has it or nothing tells."""
    quick_gelu = _trained_with_quick_gelu(mapping, config)
    if quick_gelu is not None and quick_gelu != _is_quick_gelu(model):
        return 'quick_gelu' if quick_gelu else 'gelu'
    vision = _vision(config)
    if not isinstance(vision.get('hidden_act'), str) or vision.get('use_swiglu_ffn'):
        return None
    timm_name, activation = _ACTIVATIONS.get(vision['hidden_act'], (None, None))
    return timm_name if activation is not None and _differs(activation, model) else None


@reads_configs
def unknowns(mapping: Mapping, model: nn.Module, config: Configs) -> List[str]:
    """Notes about facts that neither the format of the file nor a config tells, so the user has to check them."""
    if 'CLIP' in mapping.rule.method and _trained_with_quick_gelu(mapping, config) is None:
        activation = 'QuickGELU' if _is_quick_gelu(model) else 'another activation'
        return [f'the file does not tell whether it was trained with QuickGELU, as the weights of OpenAI were; '
                f'this model has {activation}']  # fmt: skip
    return []


def _activations(model: nn.Module) -> List[nn.Module]:
    """Activations inside the blocks of a model, as far as they have no parameters."""
    found = [m for name, m in model.named_modules() if re.fullmatch(r'act\d?', name.rpartition('.')[2])]
    return [m for m in found if not isinstance(m, nn.Identity) and not any(True for _ in m.parameters())]


def _curve(activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return activation(torch.linspace(-4, 4, 65, device='cpu'))


def _differs(activation: Callable[[torch.Tensor], torch.Tensor], model: nn.Module) -> Optional[str]:
    """Name of an activation of the model that computes something else, None if none does."""
    expected = _curve(activation)
    others = [m for m in _activations(model) if (_curve(m) - expected).abs().max() > 1e-6]
    return type(others[0]).__name__ if others else None


def _epsilons(model: nn.Module) -> List[float]:
    """Epsilons of the layer norms that the configs of other libraries speak of."""
    norms = [m for name, m in model.named_modules() if _NORMS.fullmatch(name) and isinstance(m, nn.LayerNorm)]
    return [norm.eps for norm in norms]


def _compare_epsilon(trained: Any, model: nn.Module, key: str) -> List[str]:
    if not isinstance(trained, (int, float)):
        return []
    built = sorted({eps for eps in _epsilons(model) if eps != trained})
    if not built:
        return []
    return [
        f'The network was trained with {key} {trained:g}, this model has {", ".join(f"{eps:g}" for eps in built)}: in '
        f'Python create it with norm_layer=functools.partial(torch.nn.LayerNorm, eps={trained:g}).'
    ]


def _compare_activation(name: str, model: nn.Module, key: str) -> List[str]:
    if name not in _ACTIVATIONS:
        return [f'The network was trained with the activation {name!r} ({key}), which is not known here.']
    timm_name, activation = _ACTIVATIONS[name]
    built = _differs(activation, model)
    # a mismatch with QuickGELU has an error of its own
    if built is None or name == 'quick_gelu' or 'QuickGELU' in built:
        return []
    return [
        f'The network was trained with the activation {name!r} ({key}), this model has {built}: create it with '
        f"act_layer='{timm_name}' (train.py: --model-kwargs act_layer={timm_name})."
    ]


def _stride(block: Any, name: str) -> int:
    stride = getattr(getattr(block, name, None), 'stride', 1)
    return stride[0] if isinstance(stride, tuple) else stride


def _of_resnets(config: Configs, model: Any) -> List[str]:
    """Where the ResNets of transformers halve the image."""
    first, second = (getattr(model, name, None) for name in ('layer1', 'layer2'))
    if not first or not second:
        return []
    found = []
    in_bottleneck = hasattr(second[0], 'conv3') and _stride(second[0], 'conv1') > 1
    asked = config.get('downsample_in_bottleneck', False) and config.get('layer_type', 'bottleneck') == 'bottleneck'
    if hasattr(second[0], 'conv3') and bool(asked) != in_bottleneck:
        found.append(
            f'The network was trained with downsample_in_bottleneck {bool(asked)}, this model halves the image in the '
            f'{"first" if in_bottleneck else "second"} convolution of a block. timm has no other such ResNet.'
        )
    in_first = any(_stride(first[0], name) > 1 for name in ('conv1', 'conv2'))
    if bool(config.get('downsample_in_first_stage', False)) != in_first:
        found.append(
            f'The network was trained with downsample_in_first_stage {not in_first}, this model has {in_first}. timm '
            'has no other such ResNet.'
        )
    return found


def _of_unseen_keys(config: Configs, model: Any) -> List[str]:
    """Keys of single networks of transformers that change the output and no shape."""
    found = []
    if config.get('model_type') == 'regnet' and config.get('downsample_in_first_stage') is False:
        found.append(
            'The network was trained with downsample_in_first_stage False, this model halves the image there. timm has '
            'no other such RegNet.'
        )
    trained, built = config.get('rope_theta'), getattr(getattr(model, 'rope', None), 'temperature', None)
    if config.get('model_type') == 'dinov3_vit' and trained and built and trained != built:
        found.append(
            f'The network was trained with rope_theta {trained:g}, this model has {built:g}: create it with '
            f'rope_temperature={trained:g} (train.py: --model-kwargs rope_temperature={trained:g}).'
        )
    return found


def _of_transformers(config: Configs, model: nn.Module) -> List[str]:
    vision = section_of(config, 'vision_config') or config
    found = []
    if isinstance(vision.get('hidden_act'), str) and not vision.get('use_swiglu_ffn'):
        found += _compare_activation(vision['hidden_act'], model, 'hidden_act')
    found += _compare_epsilon(vision.get('layer_norm_eps'), model, 'layer_norm_eps')
    found += _of_unseen_keys(vision, model)
    if 'resnet' in str(vision.get('model_type', '')).lower() or 'downsample_in_bottleneck' in vision:
        found += _of_resnets(vision, model)
    return found


def _heads(model: nn.Module) -> List[int]:
    return [m.num_heads for name, m in model.named_modules() if name.endswith('attn') and hasattr(m, 'num_heads')]


def _of_open_clip(config: Configs, model: nn.Module) -> List[str]:
    vision = section_of(config, 'model_cfg', 'vision_cfg')
    if not vision or 'timm_model_name' in vision or not isinstance(vision.get('layers'), int):
        return []
    found = _compare_epsilon((vision.get('norm_kwargs') or {}).get('eps', 1e-5), model, 'eps')
    heads = vision.get('width', 768) // vision.get('head_width', 64)
    built = next((n for n in _heads(model) if n != heads), None)
    if built is not None:
        found.append(
            f'The network was trained with {heads} attention heads (head_width), this model has {built}: create it '
            f'with num_heads={heads} (train.py: --model-kwargs num_heads={heads}).'
        )
    if not section_of(config, 'model_cfg').get('quick_gelu'):
        tanh = (vision.get('act_kwargs') or {}).get('approximate') == 'tanh'
        found += _compare_activation('gelu_pytorch_tanh' if tanh else 'gelu', model, 'act_kwargs')
    return found


def _batch_norm_epsilons(model: nn.Module) -> List[float]:
    return [m.eps for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _curves(model: nn.Module) -> List[List[float]]:
    return [_curve(m).tolist() for m in _activations(model)]


def _of_timm(config: Configs, model: Any) -> List[str]:
    description = describe_config(config, CONFIG_NAME)
    if description is None or not is_model(description.architecture):
        return []

    def relevant(args: Dict[str, Any]) -> Dict[str, Any]:
        return {k: v for k, v in args.items() if k not in _FREE and not k.endswith('drop_rate')}

    name, args = description.architecture, relevant(description.model_args)
    if name == (model.pretrained_cfg or {}).get('architecture') and args == relevant(model._model_args):
        return []
    try:
        with torch.device('meta'):
            trained = create_model(name, num_classes=0, **args)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as e:
        return [f'The network was trained as {name} with {args}, which timm cannot build here: {e}.']
    found = []
    for what, fact in (
        ('numbers of attention heads', _heads),
        ('activations', _curves),
        ('epsilons of layer norms', _epsilons),
        ('epsilons of BatchNorm', _batch_norm_epsilons),
    ):
        one, other = fact(trained), fact(model)
        if len(one) == len(other) and one != other:
            found.append(what)
    if not found:
        return []
    given = ''.join(f', {key}={value!r}' for key, value in args.items())
    return [
        f'The network was trained as {name}{given}, this model has other {" and ".join(found)}: create it with this '
        'name and these arguments (train.py: --model, --model-kwargs).'
    ]


@reads_configs
def differences(model: nn.Module, config: Configs) -> List[str]:
    """Errors for a model that differs from what the config beside a checkpoint says, although all shapes may agree.

    Args:
        model: The model that is to be filled.
        config: Contents of the JSON files beside the weights, by file name.
    """
    content = section_of(config, CONFIG_NAME)
    is_timm = 'architecture' in content and hasattr(model, '_model_args')
    found = _of_timm(content, model) if is_timm else _of_transformers(content, model)
    return found + _of_open_clip(section_of(config, 'open_clip_config.json'), model)
