"""Load a tuned classifier with what its config says of classes and images"""

import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from ..checkpoint.source import download_from_hub, hub_id_of, same_commit
from ..model_config import check_model
from ..redaction import expand_home
from ..run_folder import (
    ARGS_NAME,
    BEST_WEIGHTS_NAME,
    CONFIG_NAME,
    SEGMENTATION_CONFIG_NAME,
    WEIGHTS_NAME,
    describe_weights,
    find_weights,
    read_args,
    read_json,
)


class Classifier(NamedTuple):
    """A classifier and what belongs to it.

    Attributes:
        model: The timm model in evaluation mode.
        data_config: Preparation of its images, as timm.data.create_transform takes it.
        class_names: Names of the classes by index. Their indices as text if the config has no names.
        multi_label: Whether an image may have several labels, so that probabilities do not sum to 1.
    """

    model: Any
    data_config: Dict[str, Any]
    class_names: List[str]
    multi_label: bool


def load_classifier(
    source: Union[str, os.PathLike],
    device: Optional[Union[str, torch.device]] = None,
) -> Classifier:
    """Load a classifier that was trained by train.py or exported by this package.

    Args:
        source: Output folder of train.py, folder of an exported model, file of weights in one of these, or
            `hf-hub:owner/name[@revision]`.
        device: Device to put the model on. When None the CPU.

    Raises:
        ValueError: The source has no classifier, or its files do not fit each other.
    """
    config_path, weights_path = _find_files(expand_home(os.fspath(source)))
    described = describe_weights(config_path)
    config = read_json(config_path, 'the description of a classifier')
    if described is None:
        raise ValueError(f'Expected the description of a timm model in {config_path!r}. Get the file again.')
    check_model(described.architecture, described.model_args, config_path)
    num_classes = config.get('num_classes')
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(
            f'Expected the number of classes in {config_path!r}, got {num_classes!r}: it is no classifier.'
        )
    try:
        weights = load_file(weights_path)
    except (SafetensorError, OSError) as e:
        raise ValueError(f'Expected the weights that {config_path!r} describes in {weights_path!r}: {e}') from e
    try:
        model: Any = timm.create_model(
            described.architecture, pretrained=False, **{**described.model_args, 'num_classes': num_classes}
        )
        model.load_state_dict(weights)
    except Exception as e:  # models raise errors of many kinds for arguments that do not fit each other
        raise ValueError(f'Expected the weights that {config_path!r} describes in {weights_path!r}: {e!r}') from e
    model.pretrained_cfg = {**model.pretrained_cfg, **described.data_config}
    names = config.get('label_names')
    if not isinstance(names, list) or len(names) != num_classes:
        names = range(num_classes)
    return Classifier(
        model.to(device).eval(),
        resolve_model_data_config(model),
        [str(name) for name in names],
        _is_multi_label(os.path.dirname(config_path)),
    )


def is_segmentation(source: str) -> bool:
    """Whether a folder, or a repository of the Hub, holds a segmentation model."""
    source = expand_home(source)
    hub_id = None if os.path.exists(source) else hub_id_of(source)
    if hub_id is not None:
        return download_from_hub(hub_id, SEGMENTATION_CONFIG_NAME) is not None
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    return os.path.isfile(os.path.join(folder, SEGMENTATION_CONFIG_NAME))


def _find_files(source: str) -> Tuple[str, str]:
    """Paths of the config and of the weights."""
    hub_id = None if os.path.exists(source) else hub_id_of(source)
    if hub_id is not None:
        config = download_from_hub(hub_id, CONFIG_NAME)
        weights = config and download_from_hub(same_commit(hub_id, config), WEIGHTS_NAME)
        if config is None or weights is None:
            raise ValueError(
                f'Expected {CONFIG_NAME} and {WEIGHTS_NAME} in hf-hub:{hub_id}, found no '
                f'{CONFIG_NAME if config is None else WEIGHTS_NAME}. Push a run there: timm-coretune hub push.'
            )
        download_from_hub(same_commit(hub_id, config), ARGS_NAME)  # which may tell of several labels
        return config, weights
    if not os.path.exists(source):
        raise ValueError(
            f'Expected the output folder of a run, an exported model or its weights in {source!r}, there is nothing. '
            'Check the path. A model of the Hub is hf-hub:owner/name.'
        )
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    config = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(config):
        raise ValueError(
            f'Expected {CONFIG_NAME} beside the weights in {folder!r}, found none: it says which model they are of. A '
            'run writes it; timm_coretune.export_model writes it for a model of your own.'
        )
    described = describe_weights(config)
    weights = source if os.path.isfile(source) else described and find_weights(folder, described)
    if not weights:
        raise ValueError(
            f'Expected {BEST_WEIGHTS_NAME} or {WEIGHTS_NAME} beside {CONFIG_NAME} in {folder!r}, found neither. A run '
            'writes its weights when its first epoch is over.'
        )
    return config, weights


def _is_multi_label(folder: str) -> bool:
    """Whether the run was one of --task multilabel, by its arguments. Without them images have one label."""
    if not os.path.isfile(os.path.join(folder, ARGS_NAME)):
        return False
    return read_args(folder).get('task') == 'multilabel'
