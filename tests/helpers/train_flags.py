"""timm's flags, as its training script declares them, and those of train.py"""

import ast
import json
from types import SimpleNamespace

import yaml
from paths import HELPERS, ROOT

from timm_coretune.train.cli.arguments import create_parser, parse_args

PACKAGE = ROOT / 'timm_coretune'

TIMM_OPTIONS = json.loads((HELPERS / 'timm_train_flags.json').read_text())['options']

PARSER = create_parser()

ACTIONS = {name: action for action in PARSER._actions for name in action.option_strings or [action.dest]}

TIMM_NAMES = {name for option in TIMM_OPTIONS for name in option['flags']}

OWN_ACTIONS = [a for a in PARSER._actions if a.dest != 'help' and not TIMM_NAMES & {*a.option_strings, a.dest}]

TREES = {  # sources of the package, by their path in train/
    path.relative_to(PACKAGE / 'train').as_posix(): ast.parse(path.read_text())
    for path in (PACKAGE / 'train').rglob('*.py')
}


def flat(words):
    """All settings of a command line by name."""
    return SimpleNamespace(**parse_args(words).settings.flat())


def preset(name):
    return yaml.safe_load((PACKAGE / 'assets' / f'preset_{name}.yaml').read_text())
