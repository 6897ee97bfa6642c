"""Reads segmentation.json, which may come from anyone: each field is checked before a model is built from it"""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from ..model_config import check_model, shown
from ..run_folder import read_json
from .data.transforms import INTERPOLATIONS
from .decoder import HEADS

MAX_CLASSES = 256  # a mask has a byte for each pixel
_LARGEST_SIDE = 2**14  # pixels
_MOST_NAMES = 2**20


class ModelDescription(NamedTuple):
    """What segmentation.json says.

    Attributes:
        architecture: timm model of the backbone.
        backbone_args: Arguments of timm.create_model for it.
        head: Name of the head.
        num_classes: Number of classes of the pixels.
        class_names: Their names by index, None if not known.
        img_size: Height and width of the images of the training.
        reductions: Height of the padded image divided by that of each feature map.
        data_config: Mean, std and interpolation of the training.
    """

    architecture: str
    backbone_args: Dict[str, Any]
    head: str
    num_classes: int
    class_names: Optional[List[str]]
    img_size: Tuple[int, int]
    reductions: List[int]
    data_config: Dict[str, Any]


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_list(value: Any, of: Callable[[Any], bool], low: int = 1, high: int = 1024) -> bool:
    return isinstance(value, list) and low <= len(value) <= high and all(map(of, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 10  # False for nan


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1024


# what a field has to be, in words and as a check
_FIELDS: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    'head': (f'one of {", ".join(HEADS)}', lambda v: isinstance(v, str) and v in HEADS),
    'num_classes': (f'a number of 1 to {MAX_CLASSES}', lambda v: _is_whole(v, 1, MAX_CLASSES)),
    'class_names': ('a list of names, or null', lambda v: v is None or _is_list(v, _is_name, high=MAX_CLASSES)),
    'img_size': (
        f'height and width, of 1 to {_LARGEST_SIDE} pixels',
        lambda v: _is_list(v, lambda side: _is_whole(side, 1, _LARGEST_SIDE), 2, 2),
    ),
    'mean': ('a number from -10 to 10 for each channel', lambda v: _is_list(v, _is_number)),
    'std': ('a number above 0, up to 10, for each channel', lambda v: _is_list(v, lambda x: _is_number(x) and x > 0)),
    'interpolation': (
        f'one of {", ".join(INTERPOLATIONS)}',
        lambda v: isinstance(v, str) and v in INTERPOLATIONS,
    ),
    'reductions': (
        'whole numbers of 1 or more',
        lambda v: _is_list(v, lambda r: _is_whole(r, 1, _LARGEST_SIDE), high=64),
    ),
    'backbone': ('an object that describes a timm model', lambda v: isinstance(v, dict)),
}


def read_description(path: str) -> ModelDescription:
    """Read and check segmentation.json.

    Raises:
        ValueError: It is no JSON, or a field is missing or not what it should be. The message names file and field.
    """
    config = read_json(path, 'the description of a segmentation model')
    if not isinstance(config, dict):
        raise _wrong(path, 'an object', config)
    for name, (words, check) in _FIELDS.items():
        if name not in config:
            raise ValueError(f'Expected the description of a segmentation model in {path!r}, {name!r} is missing.')
        if not check(config[name]):
            raise _wrong(path, f'{words} as {name!r}', config[name])
    names, backbone = config['class_names'], config['backbone']
    if names is not None and len(names) != config['num_classes']:
        raise _wrong(path, f'{config["num_classes"]} names as class_names', names)
    if len(config['mean']) != len(config['std']):
        raise _wrong(path, f'as many numbers as mean has ({len(config["mean"])}) as std', config['std'])
    model_args = backbone.get('model_args') or {}
    check_model(backbone.get('architecture'), model_args, path)
    num_classes = model_args.get('num_classes', backbone.get('num_classes'))
    if not _is_whole(num_classes, 0, _MOST_NAMES):
        raise _wrong(path, "a whole number as 'num_classes' of the backbone", num_classes)
    return ModelDescription(
        backbone['architecture'],
        {**model_args, 'num_classes': num_classes},
        config['head'],
        config['num_classes'],
        names,
        (config['img_size'][0], config['img_size'][1]),
        config['reductions'],
        {key: config[key] for key in ('mean', 'std', 'interpolation')},
    )


def _wrong(path: str, expected: str, value: Any) -> ValueError:
    return ValueError(
        f'Expected the description of a segmentation model in {path!r}, with {expected}, got {shown(value)}. Get '
        'the file again, from where the model is from.'
    )
