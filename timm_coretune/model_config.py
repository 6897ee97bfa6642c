"""Checks what the config of a model says, which may come from anyone, before timm sees it

Arguments of timm.create_model can name files to open and repositories to download.
"""

import dataclasses
import functools
import inspect
import re
import sys
from typing import Any, Dict, FrozenSet, NamedTuple, Optional, Tuple

import timm
import torch.nn as nn
from timm.models import build_model_with_cfg, is_model, model_entrypoint

from .checks import clip

# what timm's data config says about the preparation of images
PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')

_LONGEST_LIST = 256
_LARGEST_NUMBER = 2**14  # width, depth or size in pixels
_MOST_CLASSES = 2**20
_MOST_PIXELS = 2**16  # of a side of an image
_MOST_LAYERS = 256


class Description(NamedTuple):
    """What the config beside weights says about the model and about the preparation of its images.

    Attributes:
        path: The config.
        architecture: timm model, of a segmentation model its backbone.
        model_args: Arguments of the timm model.
        data_config: Values by the names in PREPROCESSING, as far as the config has them.
        segmentation_head: Head of a segmentation model, None for a classifier.
    """

    path: str
    architecture: str
    model_args: Dict[str, Any]
    data_config: Dict[str, Any]
    segmentation_head: Optional[str] = None


def describe_config(config: Any, path: str) -> Optional[Description]:
    """Take the description of a model from the content of a config. None if it is not of timm or of this package.

    Args:
        config: Content of a config.json or segmentation.json.
        path: Its path, for messages.

    Raises:
        ValueError: The config asks timm to load other weights, or describes no model that can be built. The message is
            a sentence with the path of the config.
    """
    timm_config = config.get('backbone', config) if isinstance(config, dict) else None
    if not isinstance(timm_config, dict) or 'architecture' not in timm_config:
        return None
    architecture = timm_config['architecture']
    if not isinstance(architecture, str):
        raise ValueError(f'Expected the architecture as text in {path!r}, got {shown(architecture)}. Get it again.')
    if not is_timm_name(architecture):
        return None
    model_args = timm_config.get('model_args') or {}
    check_arguments(model_args, path)
    try:
        images = dict(timm_config.get('pretrained_cfg') or {})
        if timm_config is not config:
            images = {**config, 'input_size': (images.get('input_size', (3,))[0], *config['img_size'])}
    except (LookupError, TypeError, ValueError) as e:
        raise ValueError(f'Expected the description of a model in {path!r}, got {shown(e)}. Get it again.') from e
    data_config = {key: images[key] for key in PREPROCESSING if images.get(key) is not None}
    data_config = {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}
    try:
        _check_images(data_config)
    except ValueError as e:
        raise ValueError(f'{e} in {path!r}. Get the file again.') from None
    args = {key: value for key, value in model_args.items() if key != 'num_classes'}
    head = config.get('head') if timm_config is not config else None
    if head is not None and not isinstance(head, str):
        raise ValueError(f'Expected the head as text in {path!r}, got {shown(head)}. Get the file again.')
    return Description(path, architecture, args, data_config, head)


def check_model(architecture: Any, model_args: Any, path: str) -> None:
    """Check that a config asks for a model of timm, by arguments of its layers alone.

    Args:
        architecture: Name of the model.
        model_args: Its arguments.
        path: The config, for messages.

    Raises:
        ValueError: The name is not that of a timm model, or an argument is none that builds layers.
    """
    if not is_timm_name(architecture) or not is_model(architecture):
        raise ValueError(
            f'Expected the name of a timm model as the architecture in {path!r}, got {shown(architecture)}. Take '
            'configs from people you trust, or a newer timm.'
        )
    check_arguments(model_args, path)
    known = _known_arguments(model_entrypoint(architecture).__module__)
    unknown = [name for name in model_args if not {name, re.sub('^(transformer|conv)_', '', name)} & known]
    if unknown:
        raise ValueError(
            f'Expected arguments of the layers of {architecture} in model_args of {path!r}, got '
            f'{", ".join(map(shown, unknown[:5]))}. Remove them there, or take a newer timm.'
        )


def check_arguments(model_args: Any, path: str) -> None:
    """Refuse arguments of a model with which timm would load weights, and values that are not plain.

    Raises:
        ValueError: There is such an argument. The message names it and the config.
    """
    if not isinstance(model_args, dict):
        raise ValueError(f'Expected arguments by name as model_args in {path!r}, got {shown(model_args)}.')
    for name, value in model_args.items():
        if name in _loading_arguments():
            raise ValueError(
                f'Expected arguments that build the model in model_args of {path!r}, got {name}={shown(value)}, with '
                'which timm would load weights from elsewhere. Remove it if you trust the rest.'
            )
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if re.search('depth|layers|blocks', name) and any(isinstance(n, int) and n > _MOST_LAYERS for n in numbers):
            raise ValueError(
                f'Expected at most {_MOST_LAYERS} layers in model_args of {path!r}, got {name}={shown(value)}.'
            )
        largest = _MOST_CLASSES if name == 'num_classes' else _LARGEST_NUMBER
        if not re.fullmatch(r'\w{1,64}', name) or not is_plain(value, largest):
            raise ValueError(
                f'Expected numbers, names and lists of these in model_args of {path!r}, got '
                f'{shown(name)}: {shown(value)}.'
            )


def is_plain(value: Any, largest: float, levels: int = 4) -> bool:
    """Whether a value may be an argument of a timm model: numbers, short names, and lists and tables of these."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, (int, float)):
        return abs(value) <= largest  # False for nan and inf
    if isinstance(value, str):
        return re.fullmatch(r'[\w.+-]{0,64}', value) is not None
    if levels == 0 or not isinstance(value, (list, tuple, dict)) or len(value) > _LONGEST_LIST:
        return False
    if isinstance(value, dict):
        return all(
            isinstance(k, str) and is_plain(k, largest) and is_plain(v, largest, levels - 1) for k, v in value.items()
        )
    return all(is_plain(v, largest, levels - 1) for v in value)


def is_timm_name(name: Any) -> bool:
    """Whether a value can be the name of a timm model: no `hf-hub:` or `local-dir:`, which load from elsewhere."""
    return isinstance(name, str) and re.fullmatch(r'\w+(\.[\w-]+)?', name) is not None


def check_normalization(mean: Any, std: Any) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Return the mean and std of images as tuples, from lists of numbers or from text with spaces.

    Raises:
        ValueError: They are not as many finite numbers for pixels between 0 and 1. The message has no end and names no
            file.
    """
    try:
        pair = tuple(
            tuple(float(number) for number in (values.split() if isinstance(values, str) else values))
            for values in (mean, std)
        )
    except (TypeError, ValueError, OverflowError):
        pair = ((), ())
    means, stds = pair
    if (
        not means
        or len(means) != len(stds)
        or not all(-10 <= m <= 10 for m in means)
        or not all(0 < s <= 10 for s in stds)
    ):
        raise ValueError(
            f'Expected mean and std as one number for each channel of pixels between 0 and 1, got mean {shown(mean)} '
            f'and std {shown(std)}'
        )
    return means, stds


def _check_images(images: Dict[str, Any]) -> None:
    """Refuse values that no preparation of images has.

    Raises:
        ValueError: A value is of another kind or size. The message has no end and names no file.
    """
    if 'mean' in images or 'std' in images:
        check_normalization(images.get('mean'), images.get('std'))
    size, crop = images.get('input_size', (3, 1, 1)), images.get('crop_pct', 1)
    is_size = isinstance(size, (list, tuple)) and len(size) == 3
    if not is_size or not all(type(n) is int and 0 < n <= _MOST_PIXELS for n in size):
        raise ValueError(f'Expected input_size as channels, height and width, got {shown(size)}')
    if isinstance(crop, bool) or not isinstance(crop, (int, float)) or not 0 < crop <= 10:
        raise ValueError(f'Expected crop_pct as a share of the image, got {shown(crop)}')
    for key in ('interpolation', 'crop_mode'):
        if not isinstance(images.get(key, ''), str):
            raise ValueError(f'Expected {key} as text, got {shown(images[key])}')


@functools.cache
def _loading_arguments() -> FrozenSet[str]:
    """Arguments with which timm loads weights: those that its factory functions take themselves."""
    functions = (timm.create_model, build_model_with_cfg)
    return frozenset(name for f in functions for name in inspect.signature(f).parameters) - {'kwargs'}


@functools.cache
def _known_arguments(module: str) -> FrozenSet[str]:
    """Names of all arguments that the layers and configs of timm's models, and of one more module, are built from."""
    places = [place for name, place in sys.modules.items() if name.startswith('timm.models.') or name == module]
    known = {'bn_eps', 'bn_momentum', 'bn_tf', 'norm_eps', 'use_naflex'}  # which timm takes from the others first
    for kind in {kind for place in places for kind in vars(place).values() if inspect.isclass(kind)}:
        if dataclasses.is_dataclass(kind):
            known |= {field.name for field in dataclasses.fields(kind)}
        if issubclass(kind, nn.Module):
            for init in (vars(part)['__init__'] for part in kind.__mro__ if '__init__' in vars(part)):
                parameters = inspect.signature(init).parameters.values()
                known |= {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
    return frozenset(known) - _loading_arguments() - {'self', 'args'}


def shown(value: Any) -> str:
    """A value of a config as text for a message, which is cut if it is long."""
    try:
        return clip(repr(value))
    except RecursionError:
        return f'a {type(value).__name__} that is nested too deeply'
