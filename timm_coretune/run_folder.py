"""Names of the files that a run of train.py leaves in its output folder, and functions that read them

A config may come from anyone. What it says about a model is checked before timm sees it, as arguments of
timm.create_model can name files to open and repositories to download.
"""

import csv
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import sys
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Tuple, Union

import timm
import torch.nn as nn
import yaml
from safetensors import safe_open
from timm.models import build_model_with_cfg, is_model, model_entrypoint

from .listing import shorten

ARGS_NAME = 'args.yaml'
SUMMARY_NAME = 'summary.csv'
BEST_WEIGHTS_NAME = 'model_best.safetensors'
WEIGHTS_NAME = 'model.safetensors'  # of an exported model; the backbone if that is a segmentation model
SEGMENTATION_WEIGHTS_NAME = 'segmentation.safetensors'  # backbone and head of an exported segmentation model
CONFIG_NAME = 'config.json'  # plain timm rebuilds a classifier from it
SEGMENTATION_CONFIG_NAME = 'segmentation.json'  # load_segmentation_model rebuilds a segmentation model from it
# tables with a row for each class, from the best epoch
CONFUSION_NAME = 'confusion.csv'
PER_CLASS_NAME = 'per_class.csv'
# pictures
CURVES_NAME = 'curves.png'
CONFUSION_PICTURE_NAME = 'confusion.png'
PREDICTIONS_NAME = 'segmentation.png'
# states of training to resume from; timm's CheckpointSaver chose these names
STATE_SUFFIX = '.pth.tar'
LAST_STATE_NAME = f'last{STATE_SUFFIX}'
BEST_STATE_NAME = f'model_best{STATE_SUFFIX}'
RECOVERY_PATTERN = f'recovery-*{STATE_SUFFIX}'
STATE_PATTERNS = (LAST_STATE_NAME, RECOVERY_PATTERN, f'checkpoint-*{STATE_SUFFIX}')
UNFINISHED_STATE_NAMES = (f'tmp{STATE_SUFFIX}', f'recovery_tmp{STATE_SUFFIX}')
SET_ASIDE_NAME = 'set_aside'  # folder for what a run did after the state from which it was continued by --resume FILE
# files that are pushed to the Hub beside weights, config and model card
PUBLISHED_NAMES = (
    *(ARGS_NAME, SUMMARY_NAME, CURVES_NAME, CONFUSION_PICTURE_NAME, CONFUSION_NAME, PER_CLASS_NAME, PREDICTIONS_NAME),
)

# what timm's data config says about the preparation of images
PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')

_LONGEST_CONFIG = 2**24  # characters; names of 20,000 classes are 2**19
_LONGEST_LIST = 256
_LARGEST_NUMBER = 2**14  # width, depth or size in pixels
_MOST_CLASSES = 2**20
MAX_PIXELS = 2**16  # of a side of an image
MAX_LAYERS = 256

EVAL_PREFIX = 'eval_'  # prefix of the columns of the summary that are scores of the validation


def read_summary(path: Union[str, os.PathLike]) -> List[Dict[str, str]]:
    """Read the rows of a summary.csv, one for each validated epoch. Without the file there are no rows."""
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def read_args(folder: str) -> Dict[str, Any]:
    """Read the arguments of a run by name."""
    with open(os.path.join(folder, ARGS_NAME), encoding='utf-8') as f:
        return yaml.safe_load(f)


def read_notes(weights_path: Union[str, os.PathLike]) -> Dict[str, str]:
    """Read the notes in the header of a safetensors file. Weights of a run have their epoch and kind there."""
    with safe_open(weights_path, framework='pt') as f:
        return f.metadata() or {}


def read_json(path: Union[str, os.PathLike]) -> Dict[str, Any]:
    """Read a JSON file.

    Raises:
        ValueError: It is no JSON, larger than a config can be, or no regular file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f'{os.fspath(path)!r} is no regular file')
    with open(path, encoding='utf-8') as f:
        text = f.read(_LONGEST_CONFIG + 1)
    if len(text) > _LONGEST_CONFIG:
        raise ValueError(f'{os.fspath(path)!r} is longer than {_LONGEST_CONFIG} characters')
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError(f'{os.fspath(path)!r} is nested too deeply') from e


def is_plain(value: Any, largest: float, levels: int = 4) -> bool:
    """Whether a value may be an argument of a timm model: numbers, short names, and lists and tables of these."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= largest
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
            f'Expected the name of a timm model as the architecture in {path!r}, got {_short(architecture)}. Take '
            'configs from people you trust, or a newer timm.'
        )
    check_arguments(model_args, path)
    known = _known_arguments(model_entrypoint(architecture).__module__)
    unknown = [name for name in model_args if not {name, re.sub('^(transformer|conv)_', '', name)} & known]
    if unknown:
        raise ValueError(
            f'Expected arguments of the layers of {architecture} in model_args of {path!r}, got '
            f'{", ".join(map(_short, unknown[:5]))}. Remove them there, or take a newer timm.'
        )


def check_arguments(model_args: Any, path: str) -> None:
    """Refuse arguments of a model with which timm would load weights, and values that are not plain.

    Raises:
        ValueError: There is such an argument. The message names it and the config.
    """
    if not isinstance(model_args, dict):
        raise ValueError(f'Expected arguments by name as model_args in {path!r}, got {_short(model_args)}.')
    for name, value in model_args.items():
        if name in _loading_arguments():
            raise ValueError(
                f'Expected arguments that build the model in model_args of {path!r}, got {name}={_short(value)}, with '
                'which timm would load weights from elsewhere. Remove it if you trust the rest.'
            )
        largest = _MOST_CLASSES if name == 'num_classes' else _LARGEST_NUMBER
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if re.search('depth|layers|blocks', name) and any(isinstance(n, int) and n > MAX_LAYERS for n in numbers):
            raise ValueError(f'Expected at most {MAX_LAYERS} layers in {path!r}, got {name}={_short(value)}.')
        if not re.fullmatch(r'\w{1,64}', name) or not is_plain(value, largest):
            raise ValueError(
                f'Expected numbers, names and lists of these in model_args of {path!r}, got {_short(name)}: '
                f'{_short(value)}.'
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:80]}...'


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


def check_normalization(mean: Any, std: Any) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Return the mean and std of images as tuples, from lists of numbers or from text with spaces.

    Raises:
        ValueError: They are not as many finite numbers for pixels between 0 and 1.
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
            f'Expected mean and std as one number for each channel of pixels between 0 and 1, got mean '
            f'{shorten([repr(mean)])} and std {shorten([repr(std)])}'
        )
    return means, stds


def _check_images(images: Dict[str, Any]) -> None:
    """Refuse values that no preparation of images has.

    Raises:
        ValueError: A value is of another kind or size.
    """
    if 'mean' in images or 'std' in images:
        check_normalization(images.get('mean'), images.get('std'))
    size, crop = images.get('input_size', (3, 1, 1)), images.get('crop_pct', 1)
    is_size = isinstance(size, (list, tuple)) and len(size) == 3
    if not is_size or not all(type(n) is int and 0 < n <= MAX_PIXELS for n in size):
        raise ValueError(f'Expected input_size as channels, height and width, got {shorten([repr(size)])}')
    if isinstance(crop, bool) or not isinstance(crop, (int, float)) or not 0 < crop <= 10:
        raise ValueError(f'Expected crop_pct as a share of the image, got {shorten([repr(crop)])}')
    for key in ('interpolation', 'crop_mode'):
        if not isinstance(images.get(key, ''), str):
            raise ValueError(f'Expected {key} as text, got {shorten([repr(images[key])])}')


def describe_config(config: Any, path: str) -> Optional[Description]:
    """Take the description of a model from the content of a config. None if it is not of timm or of this package.

    Raises:
        ValueError: The config asks timm to load other weights, or describes no model that can be built. KeyError and
            TypeError: it lacks something.
    """
    timm_config = config.get('backbone', config) if isinstance(config, dict) else None
    if not isinstance(timm_config, dict) or not is_timm_name(timm_config.get('architecture')):
        return None
    check_arguments(timm_config.get('model_args') or {}, path)
    images = dict(timm_config.get('pretrained_cfg') or {})
    if timm_config is not config:
        images = {**config, 'input_size': (images.get('input_size', (3,))[0], *config['img_size'])}
    data_config = {key: images[key] for key in PREPROCESSING if images.get(key) is not None}
    data_config = {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}
    try:
        _check_images(data_config)
    except ValueError as e:
        raise ValueError(f'{e} in {path!r}. Get the file again.') from None
    args = {key: value for key, value in (timm_config.get('model_args') or {}).items() if key != 'num_classes'}
    head = config.get('head') if timm_config is not config else None
    return Description(path, timm_config['architecture'], args, data_config, head)


def describe_weights(source: Union[str, os.PathLike]) -> Optional[Description]:
    """Read the config that belongs to weights on this machine.

    Args:
        source: A file of weights, or the folder of a run or of an exported model.

    Returns:
        The description, None if there is no such file or folder, or no config of timm or of this package beside it.

    Raises:
        ValueError: The config is no JSON.
    """
    source = os.fspath(source)
    if not os.path.exists(source):
        return None
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    # an exported segmentation model has the weights of its backbone alone too, which the config.json describes
    is_backbone = os.path.basename(source) == WEIGHTS_NAME
    for name in (CONFIG_NAME,) if is_backbone else (SEGMENTATION_CONFIG_NAME, CONFIG_NAME):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            try:
                config = read_json(path)
            except ValueError as e:
                raise ValueError(f'Expected the description of a model in {path!r}, got {e!r}. Get it again.') from e
            try:
                return describe_config(config, path)
            except (KeyError, TypeError) as e:
                raise ValueError(f'Expected the description of a model in {path!r}, got {e!r}. Get it again.') from e
    return None


def find_weights(folder: str, description: Description) -> Optional[str]:
    """Path of the weights in a folder that its description is about, None if there are none."""
    exported = WEIGHTS_NAME if description.segmentation_head is None else SEGMENTATION_WEIGHTS_NAME
    paths = [os.path.join(folder, name) for name in (BEST_WEIGHTS_NAME, exported)]
    return next((path for path in paths if os.path.isfile(path)), None)
