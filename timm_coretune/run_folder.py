"""Names of the files that a run of train.py leaves in its output folder, and functions that read them"""

import csv
import json
import os
from typing import Any, Dict, List, Union

import yaml
from safetensors import safe_open

ARGS_NAME = 'args.yaml'
SUMMARY_NAME = 'summary.csv'
BEST_WEIGHTS_NAME = 'model_best.safetensors'
CONFIG_NAME = 'config.json'  # plain timm rebuilds a classifier from it
SEGMENTATION_CONFIG_NAME = 'segmentation.json'  # load_segmentation_model rebuilds a segmentation model from it
# tables with a row for each class, from the best epoch
CONFUSION_NAME = 'confusion.csv'
PER_CLASS_NAME = 'per_class.csv'
# pictures
CURVES_NAME = 'curves.png'
CONFUSION_PICTURE_NAME = 'confusion.png'
PREDICTIONS_NAME = 'segmentation.png'
# states of training to resume from; timm's CheckpointSaver chose these names
STATE_SUFFIX = '.pth.tar'
LAST_STATE_NAME = f'last{STATE_SUFFIX}'
BEST_STATE_NAME = f'model_best{STATE_SUFFIX}'
RECOVERY_PATTERN = f'recovery-*{STATE_SUFFIX}'
STATE_PATTERNS = (LAST_STATE_NAME, RECOVERY_PATTERN, f'checkpoint-*{STATE_SUFFIX}')
UNFINISHED_STATE_NAMES = (f'tmp{STATE_SUFFIX}', f'recovery_tmp{STATE_SUFFIX}')
SET_ASIDE_NAME = 'set_aside'  # folder for what a run did after the state from which it was continued by --resume FILE
# files that are pushed to the Hub beside weights, config and model card
PUBLISHED_NAMES = (
    *(ARGS_NAME, SUMMARY_NAME, CURVES_NAME, CONFUSION_PICTURE_NAME, CONFUSION_NAME, PER_CLASS_NAME, PREDICTIONS_NAME),
)

EVAL_PREFIX = 'eval_'  # prefix of the columns of the summary that are scores of the validation


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


def read_notes(weights_path: Union[str, os.PathLike]) -> Dict[str, str]:
    """Read the notes in the header of a safetensors file. Weights of a run have their epoch and kind there."""
    with safe_open(weights_path, framework='pt') as f:
        return f.metadata() or {}


def read_json(path: Union[str, os.PathLike]) -> Dict[str, Any]:
    with open(path, encoding='utf-8') as f:
        return json.load(f)
