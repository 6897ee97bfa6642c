"""Write a tuned model to files that plain timm loads"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Optional, Sequence

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import _hub, get_model_input_config
from timm.utils import unwrap_model

from .atomic import write_text, write_whole
from .lora import plain_state_dict
from .redaction import redact_values
from .run_folder import CONFIG_NAME, SEGMENTATION_CONFIG_NAME, WEIGHTS_NAME, read_json

BACKBONE_PREFIX = 'backbone.'
# facts about the original weights, which may not be true of tuned weights
_OF_THE_SOURCE = ('tag', 'license', 'origin_url', 'paper_name', 'paper_ids', 'notes')


def write_json(content: Dict[str, Any], path: str) -> None:
    """Write a JSON file without secrets. If writing is interrupted, no half-written file is left."""
    write_text(json.dumps(redact_values(content), indent=2) + '\n', path)


def save_weights(state_dict: Dict[str, torch.Tensor], path: str, **metadata: str) -> None:
    """Write weights as safetensors that plain timm loads.

    Args:
        state_dict: Weights by name.
        path: File to write.
        **metadata: Notes to keep in the header of the file, such as the epoch.
    """
    # copy the tensors, as safetensors refuses tensors that share memory
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in state_dict.items()}
    blob = save(tensors, metadata={'format': 'pt', **metadata})
    # safetensors writes the notes in random order; sort them, so that equal weights give equal files
    end = 8 + int.from_bytes(blob[:8], 'little')
    head = json.loads(blob[8:end])
    head['__metadata__'] = dict(sorted(head['__metadata__'].items()))
    text = json.dumps(head, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    # safetensors.torch.save_file would make the file readable for its owner only
    with write_whole(path) as temporary, open(temporary, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little'))
        f.write(text)
        f.write(memoryview(blob)[end:])


def fit_channels(data_config: Dict[str, Any], channels: int) -> Dict[str, Any]:
    """The preprocessing of images with this number of channels: input size, mean and std of as many, as timm trains.

    Where there are more or fewer values each channel gets their mean.
    """
    fitted = dict(data_config)
    if 'input_size' in fitted:
        fitted['input_size'] = (channels, *fitted['input_size'][1:])
    for key in fitted.keys() & {'mean', 'std'}:
        values = fitted[key].tolist() if hasattr(fitted[key], 'tolist') else fitted[key]  # of numpy or torch
        fitted[key] = adapt_to_chs(values, channels)
    return fitted


def create_config(
    model: nn.Module,
    data_config: Optional[Dict[str, Any]] = None,
    label_names: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """Create the content of config.json, from which timm rebuilds a model and its preprocessing.

    Args:
        model: A timm model.
        data_config: Input size, mean, std, interpolation and crop of the training. When None those of the model.
        label_names: Names of the classes by index.

    Raises:
        ValueError: The model was built with an argument that JSON cannot hold.
    """
    data_config = resolve_data_config({}, model=model) if data_config is None else data_config
    data_config = fit_channels(data_config, get_model_input_config(model)['input_size'][0])
    model_config: Dict[str, Any] = {}
    if label_names and len(label_names) == model.num_classes:  # timm would give a shorter list to the first classes
        model_config['label_names'] = list(label_names)
    with TemporaryDirectory() as folder:
        written = Path(folder, CONFIG_NAME)
        _hub.save_config_for_hf(model, str(written), model_config=model_config, data_config=data_config)
        config = read_json(written)
    for key in _OF_THE_SOURCE:
        config['pretrained_cfg'].pop(key, None)
    return config


def export_model(
    model: nn.Module,
    folder: str,
    data_config: Optional[Dict[str, Any]] = None,
    label_names: Optional[Sequence[str]] = None,
) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Args:
        model: A timm model, such as the `get_eval_model()` of a task. It may be compiled or wrapped.
        folder: Folder to write, created if missing.
        data_config: Input size, mean, std, interpolation and crop of the training. When None those of the model.
        label_names: Names of the classes by index.
    """
    model = unwrap_model(model)
    os.makedirs(folder, exist_ok=True)
    write_json(create_config(model, data_config, label_names), os.path.join(folder, CONFIG_NAME))
    save_weights(plain_state_dict(model), os.path.join(folder, WEIGHTS_NAME))


def export_backbone(weights_path: str, config: Dict[str, Any], folder: str) -> None:
    """Write the backbone of a segmentation model as a folder that plain timm loads.

    Args:
        weights_path: Weights of the segmentation model. The notes in the header of the file are kept.
        config: Content of the config.json of the backbone.
        folder: Folder to write into.

    Raises:
        ValueError: The weights are not those of a segmentation model.
    """
    with safe_open(weights_path, framework='pt') as f:
        notes = f.metadata() or {}
        keys = [key for key in f.keys() if key.startswith(BACKBONE_PREFIX)]  # noqa: SIM118, it is no dict
        backbone = {key.removeprefix(BACKBONE_PREFIX): f.get_tensor(key) for key in keys}
    if not backbone:
        raise ValueError(
            f'Expected the weights of a segmentation model in {weights_path!r}, none of its keys starts with '
            f'{BACKBONE_PREFIX!r}. {SEGMENTATION_CONFIG_NAME} beside it may be of another run.'
        )
    write_json(config, os.path.join(folder, CONFIG_NAME))
    save_weights(backbone, os.path.join(folder, WEIGHTS_NAME), **notes)
