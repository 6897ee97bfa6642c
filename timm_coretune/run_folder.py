"""What a run of train.py leaves in its folder: the names, and who reads which"""

import csv
import json
import os
from typing import Any, Dict, List, Union

import yaml
from safetensors import safe_open

ARGS_NAME = 'args.yaml'
SUMMARY_NAME = 'summary.csv'
BEST_WEIGHTS_NAME = 'model_best.safetensors'
CONFIG_NAME = 'config.json'  # what plain timm rebuilds a classifier from
SEGMENTATION_CONFIG_NAME = 'segmentation.json'  # what load_segmentation_model rebuilds a segmentation model from
# tables of classes, of the best epoch
CONFUSION_NAME = 'confusion.csv'
PER_CLASS_NAME = 'per_class.csv'
# pictures
CURVES_NAME = 'curves.png'
CONFUSION_PICTURE_NAME = 'confusion.png'
PREDICTIONS_NAME = 'segmentation.png'
# states to continue from; timm's saver calls them so
STATE_SUFFIX = '.pth.tar'
LAST_STATE_NAME = f'last{STATE_SUFFIX}'
RECOVERY_PATTERN = f'recovery-*{STATE_SUFFIX}'
STATE_PATTERNS = (LAST_STATE_NAME, RECOVERY_PATTERN, f'checkpoint-*{STATE_SUFFIX}')
UNFINISHED_STATE_NAMES = (f'tmp{STATE_SUFFIX}', f'recovery_tmp{STATE_SUFFIX}')
# what is published beside weights, config and card
PUBLISHED_NAMES = (
    *(ARGS_NAME, SUMMARY_NAME, CURVES_NAME, CONFUSION_PICTURE_NAME, CONFUSION_NAME, PER_CLASS_NAME, PREDICTIONS_NAME),
)

EVAL_PREFIX = 'eval_'  # of the scores of a validation among the columns of the summary


def read_summary(path: Union[str, os.PathLike]) -> List[Dict[str, str]]:
    """Rows of a summary.csv by column, one for each validated epoch, none if the file is not there."""
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def read_args(folder: str) -> Dict[str, Any]:
    """The arguments of a run by name."""
    with open(os.path.join(folder, ARGS_NAME), encoding='utf-8') as f:
        return yaml.safe_load(f)


def read_notes(weights_path: Union[str, os.PathLike]) -> Dict[str, str]:
    """Notes in the head of a safetensors file: in that of a run, the epoch of the weights and what kind they are."""
    with safe_open(weights_path, framework='pt') as f:
        return f.metadata() or {}


def read_json(path: Union[str, os.PathLike]) -> Dict[str, Any]:
    with open(path, encoding='utf-8') as f:
        return json.load(f)
