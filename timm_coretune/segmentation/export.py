"""Write a segmentation model to files and load it again: safetensors, and a JSON file to rebuild the model from"""

import json
import os
from typing import Any, Dict, Optional, Sequence, Union

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from timm.utils import unwrap_model

from ..export import create_config, fit_channels, save_weights, write_json
from ..run_folder import SEGMENTATION_CONFIG_NAME, SEGMENTATION_WEIGHTS_NAME, read_json
from .data.masks import IGNORE_INDEX
from .locate import find_model_files
from .model import SegmentationModel, create_segmentation_model


def write_segmentation_config(
    model: SegmentationModel,
    path: str,
    data_config: Optional[Dict[str, Any]] = None,
    class_names: Optional[Sequence[str]] = None,
) -> None:
    """Write segmentation.json, from which `load_segmentation_model` rebuilds a model and its preprocessing.

    Args:
        model: A segmentation model.
        path: File to write.
        data_config: Mean, std and interpolation of the training. When None those of the backbone.
        class_names: Names of the classes by index.

    Raises:
        ValueError: The backbone was built with an argument that JSON cannot hold.
    """
    data_config = data_config or getattr(model, 'data_config', None) or resolve_data_config({}, model=model)
    data_config = fit_channels(data_config, get_model_input_config(model.backbone)['input_size'][0])
    config = dict(
        head=model.head,
        num_classes=model.num_classes,
        class_names=None if class_names is None else list(class_names),
        ignore_index=IGNORE_INDEX,
        img_size=list(model.img_size),
        mean=list(data_config['mean']),
        std=list(data_config['std']),
        interpolation=data_config['interpolation'],
        reductions=model.maps.reductions,
        backbone=create_config(model.backbone, data_config),
    )
    write_json(config, path)


def export_segmentation_model(
    model: SegmentationModel,
    folder: str,
    data_config: Optional[Dict[str, Any]] = None,
    class_names: Optional[Sequence[str]] = None,
) -> None:
    """Write a segmentation model as a folder that `load_segmentation_model(folder)` loads.

    Args:
        model: A segmentation model, which may be compiled or wrapped.
        folder: Folder to write, created if missing.
        data_config: Mean, std and interpolation of the training. When None those of the backbone.
        class_names: Names of the classes by index. When None those that the model was loaded with.

    Raises:
        ValueError: The backbone was built with an argument that JSON cannot hold.
    """
    model = unwrap_model(model)
    os.makedirs(folder, exist_ok=True)
    class_names = class_names or getattr(model, 'class_names', None)
    write_segmentation_config(model, os.path.join(folder, SEGMENTATION_CONFIG_NAME), data_config, class_names)
    save_weights(model.state_dict(), os.path.join(folder, SEGMENTATION_WEIGHTS_NAME))


def load_segmentation_model(
    source: Union[str, os.PathLike],
    device: Optional[Union[str, torch.device]] = None,
) -> SegmentationModel:
    """Load a segmentation model that was trained by train.py or written by `export_segmentation_model`.

    Args:
        source: Output folder of train.py, folder of an exported model, or `hf-hub:owner/name[@revision]`.
        device: Device to put the model on. When None the CPU.

    Returns:
        The model in evaluation mode. Its attributes class_names and data_config (mean, std, interpolation) are those of
        its training.

    Raises:
        ValueError: The source has no segmentation model, or its files do not fit each other.
    """
    config_path, weights_path = find_model_files(os.fspath(source))
    try:
        config = read_json(config_path)
        backbone = timm.create_model(
            config['backbone']['architecture'],
            pretrained=False,
            **{'num_classes': config['backbone']['num_classes'], **config['backbone'].get('model_args', {})},
        )
        model = create_segmentation_model(backbone, config['num_classes'], config['head'], tuple(config['img_size']))
        data_config = {key: config[key] for key in ('mean', 'std', 'interpolation')}
        reductions, class_names = config['reductions'], config['class_names']
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f'Expected the description of a segmentation model in {config_path!r}: {e!r}') from e
    if model.maps.reductions != reductions:
        raise ValueError(
            f'Expected feature maps of 1/{reductions} by {config_path!r}, {config["backbone"]["architecture"]} makes '
            f'maps of 1/{model.maps.reductions} here. Add its arguments, such as output_stride, to model_args there.'
        )
    try:
        model.load_state_dict(load_file(weights_path))
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f'Expected the weights that {config_path!r} describes in {weights_path!r}: {e}') from e
    model.data_config, model.class_names = data_config, class_names
    return model.to(device).eval()
