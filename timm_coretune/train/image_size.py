"""Builds a timm model for the size of the images that were asked for, where the architecture is built for one size"""

import logging
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import is_fast_norm, set_fast_norm, to_2tuple
from timm.models import create_model, get_pretrained_cfg_value, parse_model_name

from .cli.settings import DataSettings

_logger = logging.getLogger(__name__)

Size = Tuple[int, int]
# arguments with which a model takes images of several sizes, so that it is built as it is
_FLEXIBLE = ('dynamic_img_size', 'use_naflex')
_REFUSALS = (ValueError, TypeError, AssertionError, RuntimeError, IndexError, ZeroDivisionError)
_WITH_WEIGHTS = ('pretrained', 'checkpoint_path', 'cache_dir')


def asked_size(data: DataSettings) -> Optional[Size]:
    """Height and width of the images by --input-size or --img-size, None if the model decides."""
    if data.input_size is not None:
        return data.input_size[1], data.input_size[2]
    return None if data.img_size is None else (data.img_size, data.img_size)


def size_arguments(
    name: str,
    model_kwargs: Dict[str, Any],
    data: DataSettings,
    resizes: bool = False,
) -> Dict[str, Any]:
    """The argument img_size for a model that is built for images of one size, if that is not the size of the images.

    A model without weights tells whether it takes the images as it is. Then it is built as before, such as a ViT with
    `dynamic_img_size`.

    Args:
        name: Name of the timm model.
        model_kwargs: Arguments that the model is created with.
        data: Flags of the images.
        resizes: Whether a model that has `set_input_size` is resized later.

    Returns:
        Arguments for timm.create_model, empty if it needs none.

    Raises:
        ValueError: The model takes no images of this size, or --model-kwargs asks for another.
    """
    size = asked_size(data)
    if size is None or data.naflex_loader or any(model_kwargs.get(key) for key in _FLEXIBLE):
        return {}
    is_named = parse_model_name(name)[0] is None
    if is_named and not get_pretrained_cfg_value(name, 'fixed_input_size'):
        return {}
    kwargs = {key: value for key, value in model_kwargs.items() if key not in _WITH_WEIGHTS}
    kwargs['in_chans'] = data.num_channels
    model = _build_without_weights(name, kwargs)
    if not model.pretrained_cfg.get('fixed_input_size') or (resizes and hasattr(model, 'set_input_size')):
        return {}
    given = model_kwargs.get('img_size')
    own = to_2tuple(given) if given is not None else tuple(model.pretrained_cfg['input_size'][1:])
    refusal = None if size == own else _refusal(model, data.num_channels, size)
    if refusal is None:
        return {}
    is_known = _refusal(model, data.num_channels, own) is None  # else the refusal may have another reason than the size
    if given is not None:
        if not is_known:
            return {}
        raise ValueError(
            f'--img-size, --input-size: the images are {_text(size)}, --model-kwargs img_size={given} builds {name} '
            f'for others ({refusal}). Leave it out: the model is built for the size of the images.'
        )
    wanted = size[0] if size[0] == size[1] else size
    try:
        resized = _build_without_weights(name, {**kwargs, 'img_size': wanted})
        refusal = _refusal(resized, data.num_channels, size) if is_known else None
    except _REFUSALS as e:
        refusal = ' '.join(f'{e}'.split()) or type(e).__name__
    if refusal is not None:
        raise ValueError(
            f'--img-size, --input-size: timm cannot build {name} for images of {_text(size)} ({refusal}). Its own size '
            f'is {_text(own)}.'
        )
    text = f'{name} is built for images of {_text(size)}, not for its {_text(own)}.'
    rest = _unseen(resized, size)
    _logger.info(f'{text} {rest}' if rest else text)
    return {'img_size': wanted}


def _build_without_weights(name: str, kwargs: Dict[str, Any]) -> Any:
    is_fast = is_fast_norm()
    set_fast_norm(False)  # a fast norm asks for the autocast of its device, and without weights there is none
    try:
        with torch.random.fork_rng(devices=[]), torch.device('meta'):
            return create_model(name, **kwargs).eval()
    finally:
        set_fast_norm(is_fast)


def _refusal(model: nn.Module, num_channels: int, size: Size) -> Optional[str]:
    """Why a model without weights does not take images of this size, None if it does."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, num_channels, *size, device='meta'))
    except _REFUSALS as e:
        return ' '.join(f'{e}'.split()) or type(e).__name__
    return None


def _unseen(model: Any, size: Size) -> str:
    """How much of an image no patch covers, in one sentence. Empty if the patches cover all."""
    patch = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    if not isinstance(patch, (tuple, list)) or not any(side % part for side, part in zip(size, patch, strict=True)):
        return ''
    left = ' and '.join(str(side % part) for side, part in zip(size, patch, strict=True))
    return (
        f'Its patches are {_text(patch)}: {left} px at the lower and right edge of an image are not seen. A multiple '
        f'of {patch[0]} uses all.'
    )


def _text(size: Sequence[int]) -> str:
    return f'{size[0]} x {size[1]} px'
