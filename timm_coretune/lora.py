"""Low-rank adapters (LoRA) in a timm model, by peft

Paper: `LoRA: Low-Rank Adaptation of Large Language Models`
    - Edward Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685

A layer W x becomes W x + alpha / rank * B A x, where A and B train and W does not.
"""

import copy
import logging
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, cast

import torch
import torch.nn as nn
from timm.models.eva import EvaAttention

from .timm_model import get_classifiers

_logger = logging.getLogger(__name__)
_ADAPTER = 'default'  # peft's name for the only adapters of a model


class LoraCounts(NamedTuple):
    """What `add_lora` did.

    Attributes:
        num_layers: Layers with an adapter.
        kind: 'Linear' or 'Conv2d'.
        num_trained: Parameters of the model that train: adapters, classifier and decoder.
        num_parameters: All parameters of the model, with the adapters.
    """

    num_layers: int
    kind: str
    num_trained: int
    num_parameters: int


def add_lora(model: nn.Module, rank: int, alpha: Optional[float] = None, img_size: Tuple[int, ...] = ()) -> LoraCounts:
    """Give the layers of a timm model low-rank adapters, and freeze all else but the classifier. It changes in place.

    Adapters go to all linear layers, which are those of attention and MLP in a transformer. A network without linear
    layers gets them in its convolutions without groups. The classifier trains as it is, and so does the decoder of a
    segmentation model. Layers of which the network reads the weight without calling them get none.

    Args:
        model: A timm classifier or segmentation model.
        rank: Rank of the adapters, >= 1.
        alpha: The adapters are scaled by alpha / rank, > 0. When None, alpha is the rank, and the scale 1.
        img_size: Channels, height and width of an image. When empty those of the model.

    Raises:
        ImportError: peft is not installed.
        ValueError: An argument is out of range, or the model has no layer for an adapter.
    """
    alpha = float(rank if alpha is None else alpha)
    if rank < 1 or not alpha > 0:
        raise ValueError(f'Expected rank >= 1 and alpha > 0 of LoRA, got {rank} and {alpha:g}.')
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise ImportError("LoRA needs peft: pip install 'timm-coretune[peft]'") from e
    for module in model.modules():
        if isinstance(module, EvaAttention) and module.qkv is not None:
            module.qkv_bias_separate = True  # otherwise it reads the weight of qkv without calling the layer
    size = img_size or cast(Any, model).pretrained_cfg['input_size']
    kind, names = _find_layers(model, size)
    fresh = [p for part in get_classifiers(model) for p in part.parameters() if p.requires_grad]
    pattern = '|'.join(map(re.escape, names))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern)  # type: ignore[arg-type]  # it takes floats
    inject_adapter_in_model(config, model, _ADAPTER)
    for p in fresh:
        p.requires_grad_(True)
    parameters = list(model.parameters())
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    return LoraCounts(len(names), kind, num_trained, sum(p.numel() for p in parameters))


@torch.no_grad()
def _find_layers(model: nn.Module, img_size: Tuple[int, ...]) -> Tuple[str, List[str]]:
    """Names of the layers that get an adapter, and their kind. An image of zeros shows which layers are called."""
    fresh = {id(module) for part in get_classifiers(model) for module in part.modules()}
    called: Dict[str, nn.Module] = {}
    hooks, training = [], {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        # a subclass may do more with its weight than the layer whose adapter is known
        if type(module) in (nn.Linear, nn.Conv2d) and id(module) not in fresh:
            hooks.append(module.register_forward_hook(lambda *args, name=name: called.update({name: args[0]})))
    parameter = next(model.parameters())
    model.eval()
    try:
        model(torch.zeros(1, *img_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, was_training in training.items():
            module.training = was_training
    linear = [name for name, module in called.items() if isinstance(module, nn.Linear)]
    if linear:
        return 'Linear', linear
    convolutions = [name for name, m in called.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
    if not convolutions:
        raise ValueError(
            f'Expected a model with linear layers, or convolutions without groups, for LoRA, got '
            f'{type(model).__name__} with none. Use another model, or tune all of it.'
        )
    return 'Conv2d', convolutions


def log_lora(counts: LoraCounts, rank: int) -> None:
    """Log how many parameters train."""
    share = 100 * counts.num_trained / counts.num_parameters
    _logger.info(
        f'LoRA of rank {rank} in {counts.num_layers} {counts.kind} layers: {counts.num_trained:,} of '
        f'{counts.num_parameters:,} parameters of the model train ({share:.1f} %), with the classifier.'
    )


@torch.no_grad()
def plain_state_dict(model: nn.Module, state: Optional[Dict[str, torch.Tensor]] = None) -> Dict[str, torch.Tensor]:
    """The state dict of a model, in which adapters are added to the weights of their layers.

    Its names and their order are those of the model without adapters. The model stays as it is. The sums are made
    on the CPU, so that they are the same for a state that was saved and loaded.

    Args:
        model: A model, with or without adapters.
        state: A state dict of this model. When None that which it has.
    """
    if not any(map(_is_adapted, model.modules())):
        return model.state_dict() if state is None else state
    if state is not None:
        model = copy.deepcopy(model)
        model.load_state_dict(state)
    plain: Dict[str, torch.Tensor] = {}
    adapted: Dict[str, Any] = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    for key, value in model.state_dict().items():
        name, _, rest = key.partition('.base_layer.')
        if name in adapted and rest:
            if rest == 'weight':
                delta = copy.deepcopy(adapted[name]).cpu().get_delta_weight(_ADAPTER)
                value = (value.cpu() + delta.to(value.dtype)).to(value.device)
            plain[f'{name}.{rest}'] = value
        elif key.partition('.lora_')[0] not in adapted:
            plain[key] = value
    return plain


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, 'get_delta_weight') and hasattr(module, 'base_layer')
