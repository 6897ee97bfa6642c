"""Find the two files of a segmentation model in the folder of a run, in an exported folder, or on the Hub"""

import os
from typing import Tuple

from ..checkpoint.source import download_from_hub, hub_id_of, same_commit
from ..redaction import expand_home
from ..run_folder import BEST_WEIGHTS_NAME, CONFIG_NAME, SEGMENTATION_CONFIG_NAME, SEGMENTATION_WEIGHTS_NAME


def find_model_files(source: str) -> Tuple[str, str]:
    """Find the config and the weights of a segmentation model. Files on the Hub are downloaded into its cache.

    Args:
        source: Folder of a run, folder of an exported model, or `hf-hub:owner/name[@revision]`.

    Returns:
        Path of segmentation.json, and path of the weights that belong to it.

    Raises:
        ValueError: The source has no segmentation model, or the Hub cannot be reached.
    """
    source = expand_home(source)
    if os.path.isdir(source):
        return _from_folder(source)
    hub_id = hub_id_of(source)
    if hub_id is not None:
        return _from_hub(hub_id)
    raise ValueError(
        f'Expected the folder of a segmentation model, found none at {source!r}. Check the path. A model of the Hub is '
        'hf-hub:owner/name.'
    )


def _from_folder(folder: str) -> Tuple[str, str]:
    paths = {name: os.path.join(folder, name) for name in os.listdir(folder)}
    if SEGMENTATION_CONFIG_NAME not in paths:
        raise ValueError(_explain_no_config(folder, f'local-dir:{folder}', CONFIG_NAME in paths))
    for name in (BEST_WEIGHTS_NAME, SEGMENTATION_WEIGHTS_NAME):
        if name in paths:
            return paths[SEGMENTATION_CONFIG_NAME], paths[name]
    raise ValueError(
        f'Expected {BEST_WEIGHTS_NAME} or {SEGMENTATION_WEIGHTS_NAME} beside {SEGMENTATION_CONFIG_NAME} in {folder!r}, '
        'found neither. A run writes its weights when its first epoch is over.'
    )


def _from_hub(hub_id: str) -> Tuple[str, str]:
    config = download_from_hub(hub_id, SEGMENTATION_CONFIG_NAME)
    if config is None:
        is_classifier = download_from_hub(hub_id, CONFIG_NAME) is not None
        raise ValueError(_explain_no_config(f'hf-hub:{hub_id}', f'hf-hub:{hub_id}', is_classifier))
    weights = download_from_hub(same_commit(hub_id, config), SEGMENTATION_WEIGHTS_NAME)
    if weights is None:
        raise ValueError(
            f'Expected {SEGMENTATION_WEIGHTS_NAME} beside {SEGMENTATION_CONFIG_NAME} in hf-hub:{hub_id}, found none. '
            'Push the run again: python -m timm_coretune.hub push OUTPUT_FOLDER OWNER/NAME.'
        )
    return config, weights


def _explain_no_config(place: str, timm_name: str, is_classifier: bool) -> str:
    text = f'Expected a segmentation model in {place!r}, found no {SEGMENTATION_CONFIG_NAME}'
    if is_classifier:
        return f'{text}: this is a classifier. Load it with timm.create_model({timm_name!r}, pretrained=True).'
    return f'{text}. Give the output folder of a run that trained one, or what was pushed from it.'
