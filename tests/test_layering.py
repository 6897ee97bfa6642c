"""Imports inside the package run one way, from training down to mining, and only training knows accelerate."""

import ast
from pathlib import Path

import pytest

import timm_coretune

PACKAGE = 'timm_coretune'
ROOT = Path(timm_coretune.__file__).parent
LEVELS = {  # a module imports from lower levels only, or from its own package
    'atomic': 0,
    'checks': 0,
    'distributed': 0,
    'run_folder': 0,
    'safetensors_images': 0,
    'version': 0,
    'timm_model': 0,
    'mining': 1,
    'evaluation': 1,
    'mixup': 2,
    'loss': 3,
    'checkpoint': 3,
    'report': 3,
    'export': 3,
    'task': 4,
    'hub': 4,
    'register': 5,
    'segmentation': 5,
    '__init__': 6,
    'train': 7,
    '__main__': 8,
}
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob('*.py'))}


def unit_of(file):
    """What has a level: a module of the package, or a package in it."""
    return Path(file).parts[0].removesuffix('.py')


def imported_modules(source, file):
    """Full names of all that the source of a file imports, whether at its top or in a function.

    `from .a import b` counts as a.b, for b may be a module.
    """
    package = [PACKAGE, *Path(file).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*start, *filter(None, [node.module])])
            names |= {f'{module}.{alias.name}' for alias in node.names}
    return names


def imported_units(source, file):
    units = set()
    for name in imported_modules(source, file):
        top, _, rest = name.partition('.')
        if top == PACKAGE:
            unit = rest.partition('.')[0]
            units.add(unit if unit in LEVELS or unit in map(unit_of, FILES) else '__init__')
    return units


def violations(source, file):
    own = unit_of(file)
    found = {unit for unit in imported_units(source, file) - {own} if LEVELS[unit] >= LEVELS[own]}
    if own in imported_units(source, file) and '/' not in file:
        found.add(own)
    if own != 'train' and any(name.split('.')[0] == 'accelerate' for name in imported_modules(source, file)):
        found.add('accelerate')
    return found


def test_every_module_has_a_level():
    assert {unit_of(file) for file in FILES} - set(LEVELS) == set()


@pytest.mark.parametrize('file', FILES)
def test_a_module_imports_only_what_lies_below_it(file):
    assert violations(FILES[file].read_text(), file) == set()


def test_the_known_imports_are_seen():
    read = {file: imported_units(path.read_text(), file) for file, path in FILES.items()}
    assert read['mining.py'] == {'checks'}
    assert {'mining', 'mixup', 'distributed', 'checks'} <= read['loss/core_tuning.py']
    assert {'loss', 'timm_model', 'checks'} <= read['task.py']
    assert {'loss', 'mixup', 'task'} <= read['register.py']
    assert {'register', 'version'} <= read['__init__.py']


@pytest.mark.parametrize(
    'source, file, expected',
    [
        ('from .loss import CoreTuningLoss', 'mining.py', {'loss'}),
        ('from . import loss', 'mixup.py', {'loss'}),
        ('from .register import register', 'mixup.py', {'register'}),
        ('def f():\n    from ..task import CoreTuningTask', 'loss/core_tuning.py', {'task'}),
        ('from timm_coretune import CoreTuningTask', 'task.py', {'__init__'}),
        ('import timm_coretune.train.loop', 'hub.py', {'train'}),
        ('from ..task import CoreTuningTask', 'checkpoint/load.py', {'task'}),
        ('from ..mining import normalize\nfrom .rules import KEY_RULES', 'checkpoint/load.py', set()),
        ('from .. import CoreTuningTask\nfrom accelerate import Accelerator', 'train/loop.py', set()),
        ('import accelerate.utils', 'task.py', {'accelerate'}),
        ('import torch', 'task.py', set()),
    ],
)
def test_imports_against_the_order_would_be_noticed(source, file, expected):
    assert violations(source, file) == expected
