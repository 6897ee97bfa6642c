"""Names of the files that a run of train.py leaves in its output folder, and functions that read them"""

import csv
import json
import os
import re
from typing import Any, Dict, List, Optional, Union

import yaml
from safetensors import safe_open

from .checks import clip
from .model_config import Description, describe_config

ARGS_NAME = 'args.yaml'
SUMMARY_NAME = 'summary.csv'
RESULTS_NAME = 'results.json'  # of --eval-only with --eval-output
BEST_WEIGHTS_NAME = 'model_best.safetensors'
WEIGHTS_NAME = 'model.safetensors'  # of an exported model; the backbone if that is a segmentation model
SEGMENTATION_WEIGHTS_NAME = 'segmentation.safetensors'  # backbone and head of an exported segmentation model
CONFIG_NAME = 'config.json'  # plain timm rebuilds a classifier from it
SEGMENTATION_CONFIG_NAME = 'segmentation.json'  # load_segmentation_model rebuilds a segmentation model from it
# tables with a row for each class, from the best epoch
CONFUSION_NAME = 'confusion.csv'
PER_CLASS_NAME = 'per_class.csv'
OUTPUTS_NAME = 'predictions.safetensors'  # logits and targets of the validation, from the best epoch
AVERAGE_NAME = 'average.csv'  # scores of all weights that `timm-coretune average` tried
# pictures
CURVES_NAME = 'curves.png'
CONFUSION_PICTURE_NAME = 'confusion.png'
PREDICTIONS_NAME = 'segmentation.png'
REPORT_NAME = 'report.html'
# states of training to resume from; timm's CheckpointSaver chose these names
STATE_SUFFIX = '.pth.tar'
LAST_STATE_NAME = f'last{STATE_SUFFIX}'
BEST_STATE_NAME = f'model_best{STATE_SUFFIX}'
RECOVERY_PATTERN = f'recovery-*{STATE_SUFFIX}'
MILESTONE_PREFIX = 'milestone-'  # before the number of epochs after which --save-epochs keeps a state
STATE_PATTERNS = (
    *(LAST_STATE_NAME, RECOVERY_PATTERN, f'checkpoint-*{STATE_SUFFIX}', f'{MILESTONE_PREFIX}*{STATE_SUFFIX}'),
)
UNFINISHED_STATE_NAMES = (f'tmp{STATE_SUFFIX}', f'recovery_tmp{STATE_SUFFIX}')
# a step whose losses were not finite: a folder with what `timm-coretune replay` needs
DIVERGED_NAME = 'diverged'
KEPT_STEP_NAME = 'step.json'
KEPT_WEIGHTS_NAME = 'weights.safetensors'
SET_ASIDE_NAME = 'set_aside'  # folder for what a run did after the state from which it was continued by --resume FILE
# files that are pushed to the Hub beside weights, config and model card
PUBLISHED_NAMES = (
    *(ARGS_NAME, SUMMARY_NAME, CURVES_NAME, CONFUSION_PICTURE_NAME, CONFUSION_NAME, PER_CLASS_NAME, PREDICTIONS_NAME),
)

EVAL_PREFIX = 'eval_'  # prefix of the columns of the summary that are scores of the validation
FEATURES_PREFIX = 'features_'  # prefix of those that are figures of features
START_EPOCH = -1  # epoch of the row of the summary with what was measured before the first one

_LONGEST_JSON = 2**24  # characters; names of 20,000 classes are 2**19


def kept_share_name(process: int) -> str:
    """Name of the file with the batch of a process in a step that diverged."""
    return f'process-{process}.safetensors'


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


def read_facts_of_run(folder: str) -> Dict[str, str]:
    """Read what followed from the arguments of a run, which stands below them in comments such as `# versions: ...`."""
    with open(os.path.join(folder, ARGS_NAME), encoding='utf-8') as f:
        comments = [line[1:].partition(':') for line in f if line.startswith('#')]
    return {name.strip(): value.strip() for name, _, value in comments}


def read_lr(folder: str) -> Optional[float]:
    """Read the learning rate that a run came to, which train.py notes behind its arguments. None if it did not."""
    found = re.match(r'lr ([\d.e+-]+),', read_facts_of_run(folder).get('in this run', ''))
    return None if found is None else float(found[1])


def read_notes(weights_path: Union[str, os.PathLike]) -> Dict[str, str]:
    """Read the notes in the header of a safetensors file. Weights of a run have their epoch and kind there."""
    with safe_open(weights_path, framework='pt') as f:
        return f.metadata() or {}


def read_json(path: Union[str, os.PathLike], what: str = 'JSON') -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        ValueError: It is no JSON, larger than a config can be, no regular file, or may not be read.
    """
    path = os.fspath(path)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError('no regular file')
        with open(path, encoding='utf-8') as f:
            text = f.read(_LONGEST_JSON + 1)
        if len(text) > _LONGEST_JSON:
            raise ValueError(f'a file longer than {_LONGEST_JSON} characters')
        return json.loads(text)
    except (ValueError, RecursionError, OSError) as e:
        got = 'a file that is nested too deeply' if isinstance(e, RecursionError) else getattr(e, 'strerror', None)
        raise ValueError(f'Expected {what} in {path!r}, got {clip(got or str(e))}. Get the file again.') from e


def describe_weights(source: Union[str, os.PathLike]) -> Optional[Description]:
    """Read the config that belongs to weights on this machine.

    Args:
        source: A file of weights, or the folder of a run or of an exported model.

    Returns:
        The description, None if there is no such file or folder, or no config of timm or of this package beside it.

    Raises:
        ValueError: The config is no JSON, asks timm to load other weights, or describes no model that can be built.
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
            return describe_config(read_json(path, 'the description of a model'), path)
    return None


def find_weights(folder: str, description: Description) -> Optional[str]:
    """Path of the weights in a folder that its description is about, None if there are none."""
    exported = WEIGHTS_NAME if description.segmentation_head is None else SEGMENTATION_WEIGHTS_NAME
    paths = [os.path.join(folder, name) for name in (BEST_WEIGHTS_NAME, exported)]
    return next((path for path in paths if os.path.isfile(path)), None)
