"""Write a segmentation model to files and load it again: safetensors, and a JSON file to rebuild the model from"""

import math
import os
from typing import Any, Dict, Optional, Sequence, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from timm.utils import unwrap_model

from ..export import create_config, fit_channels, save_weights, write_json
from ..lora import plain_state_dict
from ..run_folder import SEGMENTATION_CONFIG_NAME, SEGMENTATION_WEIGHTS_NAME
from .description import ModelDescription, read_description
from .feature_maps import rounded_up
from .locate import find_model_files
from .model import SegmentationModel, build_model, create_segmentation_model

_SMALL = 2**24  # values of a model that may be created whatever the weights are


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
    save_weights(plain_state_dict(model), os.path.join(folder, SEGMENTATION_WEIGHTS_NAME))


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
    told = read_description(config_path)
    _check_size(told, config_path, weights_path)
    try:
        backbone = timm.create_model(told.architecture, pretrained=False, **told.backbone_args)
        model = create_segmentation_model(backbone, told.num_classes, told.head, told.img_size)
        if model.maps.reductions != told.reductions == rounded_up(backbone, model.maps, told.img_size):
            # an earlier version trained it, which padded images to other multiples
            maps = model.maps._replace(reductions=told.reductions)
            model = build_model(backbone, maps, told.head, told.num_classes, told.img_size)
    except Exception as e:  # models raise errors of many kinds for arguments that do not fit each other
        raise ValueError(f'Expected the description of a segmentation model in {config_path!r}: {e!r}') from e
    if model.maps.reductions != told.reductions:
        raise ValueError(
            f'Expected feature maps of 1/{told.reductions} by {config_path!r}, {told.architecture} makes maps of '
            f'1/{model.maps.reductions} here. Add its arguments, such as output_stride, to model_args there.'
        )
    try:
        model.load_state_dict(load_file(weights_path))
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f'Expected the weights that {config_path!r} describes in {weights_path!r}: {e}') from e
    model.data_config, model.class_names = told.data_config, told.class_names
    return model.to(device).eval()


def _check_size(told: ModelDescription, config_path: str, weights_path: str) -> None:
    """See that the weights are of a backbone as large as the description says, before memory is taken for it.

    Raises:
        ValueError: There is no such backbone, or the weights are not safetensors, or much smaller.
    """
    try:
        with safe_open(weights_path, framework='pt') as f:
            shapes = [f.get_slice(key).get_shape() for key in f.keys()]  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as e:
        raise ValueError(f'Expected the weights that {config_path!r} describes in {weights_path!r}: {e}') from e
    stored = sum(math.prod(shape) for shape in shapes)
    try:
        with torch.device('meta'):
            outline = timm.create_model(told.architecture, pretrained=False, **told.backbone_args)
    except Exception as e:  # models raise errors of many kinds for arguments that do not fit each other
        raise ValueError(f'Expected the description of a segmentation model in {config_path!r}: {e!r}') from e
    described = sum(p.numel() for p in outline.parameters())
    if described > 2 * stored + _SMALL:  # position embeddings may be resized to the images
        raise ValueError(
            f'Expected the weights that {config_path!r} describes in {weights_path!r}: its backbone has {described:,} '
            f'values, the weights have {stored:,}.'
        )
