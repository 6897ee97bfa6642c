"""Which index a class has: from a class map, the data set or its labels, and as in the model that is evaluated"""

import logging
import numbers
import os
from typing import Any, Dict, Hashable, List, Mapping, NamedTuple, Optional, Sequence, Set, Union

from timm.data.readers.class_map import load_class_map
from timm.models import load_model_config_from_hf, parse_model_name

from ...checkpoint.source import hub_id_of, resolve_source
from ...checks import shorten
from ...run_folder import CONFIG_NAME, read_json
from ..cli.settings import ModelSettings
from .class_folders import in_natural_order

_logger = logging.getLogger(__name__)


class LabelMap:
    """A target transform that maps the labels of a data set to class indices.

    Args:
        indices: Class index by label.
    """

    def __init__(self, indices: Mapping[Hashable, int]):
        self.indices = dict(indices)

    def __call__(self, label: Any) -> int:
        return self.indices[label]


class ModelClasses(NamedTuple):
    """The classes of a model that starts with a trained classifier.

    Attributes:
        names: Names of the classes by index, None if the model has no names.
        num_classes: Number of classes, None if that is not known.
        where: The model or file, for messages.
        is_asked_for: Whether its classifier was asked for, as --initial-checkpoint does.
    """

    names: Optional[List[str]]
    num_classes: Optional[int]
    where: str
    is_asked_for: bool = True


def read_class_map(path: str, root: str) -> Optional[Dict[str, int]]:
    """Read a class map: a .txt file of a class in each line that is not empty, or a .pkl file of a dictionary.

    Args:
        path: The file, '' for none.
        root: Folder in which the file is looked up if there is no such path.

    Raises:
        ValueError: The file cannot be read, or names a class twice or none at all.
    """
    if not path:
        return None
    found = path if os.path.exists(path) else os.path.join(root, path)
    if not os.path.isfile(found):
        raise ValueError(f'Expected a class map in --class-map {path!r}, found no such file. Check the path.')
    if not found.lower().endswith('.txt'):
        try:
            return dict(load_class_map(found))
        except Exception as e:  # unpickling raises errors of any kind
            raise ValueError(f'Expected a .txt or .pkl file in --class-map {path!r}, could not read it: {e}') from e
    with open(found, encoding='utf-8-sig') as f:
        lines = [line.strip() for line in f]
    names = [line for line in lines if line]
    if any(not line for line in lines[: len(names)]):
        _logger.warning(f'--class-map {path!r} has empty lines, which are no classes: later classes move up.')
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        what = f'{shorten(twice)} more than once' if twice else 'none'
        raise ValueError(f'Expected the name of a class in each line of --class-map {path!r}, found {what}.')
    return {name: index for index, name in enumerate(names)}


def names_by_index(class_to_idx: Mapping[Any, int]) -> List[str]:
    """Names of classes by index. Names with one index are joined, an index without a name is its own name."""
    names: Dict[int, List[str]] = {}
    for name, index in class_to_idx.items():
        names.setdefault(index, []).append(str(name))
    count = max(names) + 1
    if len(names) < count:
        _logger.warning(
            f'{count - len(names)} of {count} class indices have no name, such as in a class map with gaps.'
        )
    return [' / '.join(names.get(index, [str(index)])) for index in range(count)]


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether names are but the class indices, which stand for names that are not known."""
    return list(names) == [str(index) for index in range(len(names))]


def names_of_labels(labels: Sequence[Sequence[Any]], where: str) -> Optional[List[str]]:
    """The classes of labels that are strings, in natural order. None for labels that are indices.

    Args:
        labels: Labels of every split.
        where: The data, for messages.

    Raises:
        ValueError: The labels are neither strings nor integers.
    """
    kinds: Set[type] = {type(label) for part in labels for label in part}
    if all(issubclass(kind, numbers.Integral) for kind in kinds):
        return None
    if kinds != {str}:
        found = ', '.join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f'Expected a class index or a string as the label of each image in {where}, found {found}. --target-key '
            'names the field of the label.'
        )
    return in_natural_order(list(set().union(*labels)))


def check_labels(labels: Sequence[int], num_classes: int, what: str) -> None:
    """Raise a ValueError if a label is not a class index below num_classes. `what` are the images, for messages."""
    wrong = [index for index, label in enumerate(labels) if not 0 <= label < num_classes]
    if wrong:
        values = sorted({labels[index] for index in wrong})
        hint = ' Labels of -1 often mean that a split has no labels: choose another one.' if -1 in values else ''
        raise ValueError(
            f'Expected labels from 0 to {num_classes - 1} in {what}, {len(wrong)} of {len(labels)} are not, such as '
            f'that of image {wrong[0]}: {shorten([str(value) for value in values])}.{hint}'
        )


def read_model_classes(settings: ModelSettings) -> Optional[ModelClasses]:
    """The classes of the classifier that a run starts with, as the config of the model says. None for a new one.

    Raises:
        ValueError: The model is not there, or its config cannot be read.
    """
    source = settings.initial_checkpoint
    if not source and settings.pretrained:
        kind, name = parse_model_name(settings.model)
        if kind == 'hf-hub':  # of which timm will load the weights
            config = load_model_config_from_hf(name)[0]
            names = _listed(config.get('label_names'))
            return ModelClasses(names, config.get('num_classes'), settings.model, is_asked_for=False)
        source = name if kind == 'local-dir' else ''
    if not source:
        return None
    if hub_id_of(source) is not None:
        config = resolve_source(source).config.get(CONFIG_NAME)
    else:
        path = os.path.join(source if os.path.isdir(source) else os.path.dirname(source), CONFIG_NAME)
        config = read_json(path) if os.path.isfile(path) else None
    return config and ModelClasses(
        _listed(config.get('label_names')), config.get('num_classes'), source, bool(settings.initial_checkpoint)
    )


def _listed(names: Union[Sequence[str], Mapping[Any, str], None]) -> Optional[List[str]]:
    if isinstance(names, Mapping):  # index -> name
        names = [names[index] for index in sorted(names, key=int)]
    return [str(name) for name in names] if names else None


def follow_model(
    names: List[str],
    model: ModelClasses,
    is_trained: bool,
    has_class_map: bool,
) -> List[str]:
    """The names of the data's classes in the order of the model that is evaluated, or that training starts from.

    Args:
        names: Names of the classes of the data by index.
        model: The classes of the model.
        is_trained: Whether the model is trained on the data, so that other classes can be learnt.
        has_class_map: Whether the indices of the data are given by a class map.

    Returns:
        The names, in the order of the model if both have the same.

    Raises:
        ValueError: Model and data have different classes, and the model cannot learn those of the data.
    """
    if model.names is None or are_placeholders(names) or are_placeholders(model.names):
        if not is_trained and model.num_classes is not None and len(names) > model.num_classes:
            raise ValueError(
                f'Expected at most the {model.num_classes} classes of {model.where}, the data has {len(names)}.'
            )
        _logger.info(f'Names of classes cannot be compared with {model.where}: model or data has none.')
        return names
    if set(names) == set(model.names) and len(names) == len(model.names):
        if names != model.names:
            _logger.info(f'The classes are numbered as in {model.where}, not as in the data.')
        return model.names
    lacking, new = [n for n in model.names if n not in names], [n for n in names if n not in model.names]
    parts = [f'{shorten(found)} only in the {what}' for found, what in ((lacking, 'model'), (new, 'data')) if found]
    difference = '; '.join(parts) or 'names that occur twice'
    if len(names) == len(model.names) and has_class_map:
        _logger.warning(f'The indices of --class-map are taken as those of {model.where}: {difference}.')
        return names
    if is_trained and (len(names) != len(model.names) or not model.is_asked_for):
        _logger.warning(f'The data has other classes than {model.where}: {difference}.')
        return names
    fix = (
        'To start from the backbone alone, give it as --pretrained-path.'
        if is_trained
        else ('Rename the class folders, or name all classes of the model in their order in a --class-map.')
    )
    raise ValueError(f'Expected the classes of {model.where} in the data, got {difference}. {fix}')
