"""Find the timm models that a checkpoint fits, by the names and shapes of its tensors"""

import functools
import re
import shlex
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from timm.models import create_model, is_model
from torch.overrides import TorchFunctionMode

from ..timm_model import Target, create_target
from .differences import contradictions
from .mapping import MIN_SHARE, search, state_dicts, tensors_under
from .pretraining import resampled_patches
from .read import Checkpoint
from .report import create_call

# Arguments that change no tensor and no output, and those of the classifier: a call that is advised does without them
_LEFT_OUT = re.compile(
    r'num_classes|.*drop.*|weight_init|device|dtype|scriptable|exportable|no_jit|pretrained.*|cache_dir|checkpoint_path'
)
# Flags of train.py for arguments of a model. All others are given as --model-kwargs
_FLAGS = {'in_chans': '--in-chans', 'global_pool': '--gp'}
# What timm raises for arguments that it cannot build a model with, depending on the class
BUILD_ERRORS = (
    TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, ArithmeticError,
    NotImplementedError,
)  # fmt: skip


class Architecture(NamedTuple):
    """A timm model and its arguments.

    Attributes:
        name: Name of the timm model.
        arguments: Arguments beside the number of classes.
        assumed: What the arguments assume that the checkpoint does not tell, '' if they assume nothing.
    """

    name: str
    arguments: Dict[str, Any]
    assumed: str = ''

    def __str__(self) -> str:
        return ', '.join([self.name, *(f'{key}={value!r}' for key, value in self.arguments.items())])

    @property
    def call(self) -> str:
        """The Python call that creates the model."""
        return create_call(self.name, self.arguments)

    @property
    def flags(self) -> str:
        """Flags of train.py that create the model."""
        words = ['--model', self.name]
        for key in (key for key in _FLAGS if key in self.arguments):
            words += [_FLAGS[key], str(self.arguments[key])]
        rest = [f'{key}={value}' for key, value in self.arguments.items() if key not in _FLAGS]
        if 'img_size' in self.arguments and isinstance(self.arguments['img_size'], int):
            words += ['--img-size', str(self.arguments['img_size'])]
        return shlex.join([*words, *(['--model-kwargs', *rest] if rest else [])])


def architecture_of(model: nn.Module) -> Optional[Architecture]:
    """Name and arguments that a model was created with, None if it is no model of timm."""
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    arguments = getattr(model, '_model_args', None)
    if not isinstance(name, str) or not is_model(name) or not isinstance(arguments, dict):
        return None
    return Architecture(name, {key: value for key, value in arguments.items() if not _LEFT_OUT.fullmatch(key)})


class Family(NamedTuple):
    """timm models of one architecture, which are tried for checkpoints of that architecture.

    Attributes:
        marker: Regular expression that a key of such a checkpoint matches, whichever library wrote it.
        names: timm models, the most common first. Arguments that the shapes do not show follow the name.
        skip_init: Whether the models take `weight_init='skip'`. Initialisation takes most of the time of
            building a ViT.
    """

    marker: str
    names: Tuple[str, ...]
    skip_init: bool = False


FAMILIES = (
    Family(r'.*(cpb_mlp|continuous_position_bias_mlp)\.', (
        'swinv2_tiny_window8_256', 'swinv2_small_window8_256', 'swinv2_base_window8_256',
        'swinv2_large_window12_192',
    )),
    Family(r'(.*\.)?(lambda_1|encoder\.relative_position_bias\.relative_position_bias_table)$', (
        'beit_base_patch16_224', 'beit_large_patch16_224', 'vit_intern300m_patch14_448',
    )),
    Family(r'(.*\.)?encoder\.layers\.0\.ls1$', ('vit_intern300m_patch14_448',), skip_init=True),
    Family(r'(model\.)?layer\.0\.mlp\.up_proj\.', (
        'vit_small_patch16_dinov3', 'vit_base_patch16_dinov3', 'vit_large_patch16_dinov3',
        'vit_small_plus_patch16_dinov3', 'vit_huge_plus_patch16_dinov3', 'vit_small_patch16_dinov3_qkvb',
        'vit_base_patch16_dinov3_qkvb', 'vit_large_patch16_dinov3_qkvb', 'vit_small_plus_patch16_dinov3_qkvb',
        'vit_huge_plus_patch16_dinov3_qkvb',
    )),
    Family(r'(.*\.)?head\.probe$', (
        'vit_base_patch16_siglip_224', 'vit_large_patch16_siglip_256', 'vit_so400m_patch14_siglip_224',
        'vit_so400m_patch16_siglip_256', 'vit_base_patch32_siglip_256', 'vit_giantopt_patch16_siglip_256',
    ), skip_init=True),
    Family(r'(.*\.)?encoder\.layers\.0\.rms_norm1\.', ('aimv2_large_patch14_224', 'aimv2_huge_patch14_224'),
           skip_init=True),
    Family(r'(.*\.)?encoder\.layers\.0\.patch_embedding\.', (
        'pvt_v2_b0', 'pvt_v2_b1', 'pvt_v2_b2', 'pvt_v2_b3', 'pvt_v2_b4', 'pvt_v2_b5',
    )),
    Family(r'(.*\.)?encoder\.stages\.0\.layers\.0\.attn\.', (
        'hiera_tiny_224', 'hiera_small_224', 'hiera_base_224', 'hiera_base_plus_224', 'hiera_large_224',
    )),
    Family(r'.*(trunk_output\.block1|res2\.block1-0|s1\.b1\.conv1|stages\.0\.layers\.0\.layer\.2\.attention)\.', (
        'regnety_032', 'regnety_040', 'regnety_080', 'regnety_160', 'regnety_320', 'regnety_640', 'regnety_1280',
        'regnety_002', 'regnety_004', 'regnety_006', 'regnety_008', 'regnety_016', 'regnety_064', 'regnety_120',
        'regnety_008_tv', 'regnety_080_tv', 'regnetx_002', 'regnetx_004', 'regnetx_004_tv', 'regnetx_006',
        'regnetx_008', 'regnetx_016', 'regnetx_032', 'regnetx_080', 'regnetx_160', 'regnetx_320',
    )),
    Family(r'encoder\.layers\.encoder_layer_0\.', (
        'vit_base_patch16_224', 'vit_large_patch16_224', 'vit_base_patch32_224', 'vit_large_patch32_224',
        'vit_huge_patch14_224',
    ), skip_init=True),
    Family(r'.*relative_position_bias_table$', (
        'swin_tiny_patch4_window7_224', 'swin_small_patch4_window7_224', 'swin_base_patch4_window7_224',
        'swin_base_patch4_window12_384', 'swin_large_patch4_window7_224',
    )),
    Family(r'(.*\.)?_blocks\.0\._se_reduce\.', tuple(f'tf_efficientnet_b{i}' for i in range(9))),
    Family(r'(.*\.)?_blocks\.0\._bn1\.', tuple(f'tf_efficientnet_lite{i}' for i in range(5))),
    Family(r'(.*\.)?(features\.1\.conv\.0|conv_stem)\.', (
        'mobilenetv2_100', 'mobilenetv2_050', 'mobilenetv2_035', 'mobilenetv2_075', 'mobilenetv2_140',
    )),
    Family(r'.*(dwconv|conv_dw|depthwise_conv)\.', (
        'convnext_atto', 'convnext_tiny', 'convnext_small', 'convnext_base', 'convnext_large', 'convnext_femto',
        'convnext_pico', 'convnext_nano', 'convnextv2_atto', 'convnextv2_nano', 'convnextv2_tiny', 'convnextv2_base',
        'test_convnext', 'test_convnext2',
    )),
    Family(r'(.*\.)?storage_tokens$', (
        'vit_small_patch16_dinov3', 'vit_base_patch16_dinov3', 'vit_large_patch16_dinov3',
    )),
    Family(r'.*(class_embedding$|pre_layrnorm|norm_pre)', (
        'vit_base_patch32_clip_quickgelu_224', 'vit_base_patch16_clip_quickgelu_224',
        'vit_large_patch14_clip_quickgelu_224', 'vit_base_patch32_clip_224', 'vit_base_patch16_clip_224',
        'vit_large_patch14_clip_224',
    ), skip_init=True),
    Family(r'(.*\.)?(dist_token|distillation_token)$', (
        'deit_small_distilled_patch16_224', 'deit_base_distilled_patch16_224', 'deit_tiny_distilled_patch16_224',
    ), skip_init=True),
    Family(r'.*((blocks|layers?)\.(\d+\.)?0\.(attn|attention|ln1|norm1|norm_before)|encoder\.layer\.0\.attention)', (
        'vit_small_patch16_224', 'vit_small_patch16_224, num_heads=12', 'vit_base_patch16_224',
        'vit_large_patch16_224', 'vit_tiny_patch16_224', 'vit_small_patch8_224', 'vit_base_patch8_224',
        'vit_small_patch14_dinov2', 'vit_base_patch14_dinov2', 'vit_large_patch14_dinov2',
        'vit_small_patch14_reg4_dinov2', 'vit_base_patch14_reg4_dinov2', 'vit_large_patch14_reg4_dinov2',
        'vit_base_patch32_224', 'vit_base_patch16_gap_224', 'vit_huge_patch14_224', 'vit_giant_patch14_dinov2',
        'test_vit',
    ), skip_init=True),
    Family(r'.*(layer1\.0|(^|\.)4\.0|stages\.0\.layers\.0\.layer\.0)\.(conv1|convolution)', (
        'resnet50', 'resnet18', 'resnet34', 'resnet101', 'resnet152', 'wide_resnet50_2', 'resnext50_32x4d',
        'resnext101_32x8d', 'resnet26', 'resnet50d', 'test_resnet',
    )),
)  # fmt: skip


def parse(description: str) -> Architecture:
    """Split 'name, key=value' into the name of a timm model and its arguments, which are integers."""
    name, *arguments = description.split(', ')
    return Architecture(name, {key: int(value) for key, value in (argument.split('=') for argument in arguments)})


def candidates(checkpoint: Checkpoint) -> List[Architecture]:
    """timm models to try for a checkpoint: those of the family that its keys look like."""
    keys = {key for _, tensors in state_dicts(checkpoint.tree) for key in tensors}
    family = next((f for f in FAMILIES if any(re.match(f.marker, key) for key in keys)), None)
    return [parse(name) for name in family.names if is_model(parse(name).name)] if family else []


class _WithoutValues(TorchFunctionMode):
    """Operations that fill tensors are left out: on the meta device they have no effect, but take time."""

    filling = frozenset(
        getattr(torch.Tensor, name) for name in ('uniform_', 'normal_', 'erfinv_', 'mul_', 'add_', 'clamp_', 'fill_')
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        if func in self.filling and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_on_meta(architecture: Architecture) -> nn.Module:
    """Create a model without a classifier and without memory for its weights."""
    kwargs = dict(architecture.arguments)
    if any(family.skip_init and architecture.name in family.names for family in FAMILIES):
        kwargs['weight_init'] = 'skip'
    with torch.device('meta'), _WithoutValues():
        return create_model(architecture.name, num_classes=0, **kwargs)


_LISTED = frozenset(name for family in FAMILIES for name in family.names)


@functools.lru_cache(maxsize=len(_LISTED))
def _listed_target(description: str) -> Target:
    return create_target(build_on_meta(parse(description)))


def target_of(architecture: Architecture) -> Target:
    """Build a model without memory and describe its tensors. Those of FAMILIES are built once in a process."""
    description = str(architecture)
    return _listed_target(description) if description in _LISTED else create_target(build_on_meta(architecture))


def fitting_models(checkpoint: Checkpoint, most: int, checkpoint_key: Optional[str] = None) -> List[Architecture]:
    """Find timm models whose backbone a checkpoint fills completely.

    Args:
        checkpoint: The checkpoint.
        most: The search ends when this number of models is found.
        checkpoint_key: As for `load_checkpoint`.

    Returns:
        Models, the most common first. Those with patches of another size than in the checkpoint only if there are no
        others.
    """
    found: List[Architecture] = []
    resampling: List[Architecture] = []  # these fit too, but have patches of another size
    dicts = [tensors.values() for _, tensors in state_dicts(checkpoint.tree)]
    elements = max((sum(tensor.numel() for tensor in tensors) for tensors in dicts), default=0)
    for architecture in candidates(checkpoint):
        target = target_of(architecture)
        # what is resized, such as position embeddings, is a small part of a network, and no file has 20 copies of one
        is_small = elements < MIN_SHARE * sum(target.shapes[name].numel() for name in target.backbone)
        if is_small or not any(len(tensors) <= 20 * len(target.backbone) for tensors in dicts):
            continue
        mappings = search(target, checkpoint.tree, checkpoint_key)
        if mappings and all(m.complete and not contradictions(m, target.model, checkpoint.config) for m in mappings):
            source = tensors_under(mappings[0], checkpoint.tree)
            (resampling if resampled_patches(target.model, source) else found).append(architecture)
        if len(found) == most:
            break
    return found or resampling[:most]
