"""Names of the files that a run of train.py leaves in its output folder, and functions that read them"""

import csv
import json
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import yaml
from safetensors import safe_open

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

MAX_PIXELS = 2**16  # of a side of an image
MAX_LAYERS = 256
# arguments of timm's create_model that a config of a model never has
_READING_ARGS = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')

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
    with open(path, encoding='utf-8') as f:
        return json.load(f)


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


def _check_model_args(args: Dict[str, Any]) -> None:
    """Refuse arguments that make timm read a file or the network, and networks of more layers than there are.

    Raises:
        ValueError: There is such an argument.
    """
    foreign = sorted(key for key in args if key in _READING_ARGS)
    if foreign:
        raise ValueError(f'Expected arguments of a model, got {shorten(foreign)}, which would read other files')
    for key, value in args.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if re.search('depth|layers|blocks', str(key)) and any(isinstance(n, int) and n > MAX_LAYERS for n in numbers):
            raise ValueError(f'Expected a model of at most {MAX_LAYERS} layers, got {key}={shorten([repr(value)])}')


def describe_config(config: Any, path: str) -> Optional[Description]:
    """Take the description of a model from the content of a config. None if it is not of timm or of this package.

    Raises:
        ValueError: The config describes no model that can be built. KeyError and TypeError: it lacks something.
    """
    timm_config = config.get('backbone', config) if isinstance(config, dict) else None
    if not isinstance(timm_config, dict) or 'architecture' not in timm_config:
        return None
    images = dict(timm_config.get('pretrained_cfg') or {})
    if timm_config is not config:
        images = {**config, 'input_size': (images.get('input_size', (3,))[0], *config['img_size'])}
    data_config = {key: images[key] for key in PREPROCESSING if images.get(key) is not None}
    data_config = {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}
    _check_images(data_config)
    if not isinstance(timm_config['architecture'], str):
        raise ValueError(f'Expected architecture as text, got {shorten([repr(timm_config["architecture"])])}')
    _check_model_args(timm_config.get('model_args') or {})
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
                return describe_config(read_json(path), path)
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f'Expected the description of a model in {path!r}, got {e!r}. Get it again.') from e
    return None


def find_weights(folder: str, description: Description) -> Optional[str]:
    """Path of the weights in a folder that its description is about, None if there are none."""
    exported = WEIGHTS_NAME if description.segmentation_head is None else SEGMENTATION_WEIGHTS_NAME
    paths = [os.path.join(folder, name) for name in (BEST_WEIGHTS_NAME, exported)]
    return next((path for path in paths if os.path.isfile(path)), None)
