"""Read the JSON files beside weights, and turn what their values break into one sentence"""

import functools
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, TypeVar

from ...checks import clip
from ...model_config import Description, describe_config
from ...run_folder import CONFIG_NAME
from .limits import MAX_JSON, refuse

# keys for the folder that the configs are in, and for the file whose metadata is with them
FOLDER, FILE = 'folder', 'file'
Configs = Dict[str, Any]
Result = TypeVar('Result')


def read_json_file(path: str, size: int) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        size: Its size in bytes.

    Raises:
        ValueError: The file is too large, or no JSON.
    """
    if size > MAX_JSON:
        raise refuse(path, f'a JSON file of {size} bytes', f'At most {MAX_JSON} are read.')
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError, OSError) as e:
        raise ValueError(f'Expected JSON in {path!r}, got {clip(str(e))}. Get the file again.') from e


def describe(configs: Configs, path: str = '') -> Optional[Description]:
    """Description of a timm model in the config.json, None if that is not of timm or of this package.

    Args:
        configs: Contents of the JSON files by name.
        path: How the description names its file, '' for its path.

    Raises:
        ValueError: The config.json is of timm, but lacks something or has values that no model has.
    """
    description = describe_config(configs.get(CONFIG_NAME), os.path.join(configs.get(FOLDER, ''), CONFIG_NAME))
    return description._replace(path=path) if description is not None and path else description


def section_of(config: Configs, *names: str) -> Configs:
    """The dictionary that a path of keys leads to inside the configs, empty if there is none."""
    section: Any = config
    for name in names:
        section = section.get(name)
        if not isinstance(section, dict):
            return {}
    return section


def reads_configs(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a function whose last argument is the configs, so that values of a wrong kind are one sentence."""

    @functools.wraps(function)
    def checked(*args: Any) -> Result:
        try:
            return function(*args)
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:
            folder = args[-1].get(FOLDER)
            if folder is None:  # no foreign values, so it is an error of this package
                raise
            raise ValueError(
                f'Expected configs that describe a network in {folder!r} ({_names(args[-1])}), got values that cannot '
                f'be compared with the model: {type(e).__name__}: {clip(str(e))}. Correct or remove the config.'
            ) from e

    return checked


def _names(configs: Configs) -> str:
    names: List[str] = sorted(name for name in configs if name.endswith('.json'))
    return ', '.join(names)
