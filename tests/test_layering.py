"""Imports inside the package run one way, from training down to mining, and only training knows accelerate."""

import ast
import inspect
from pathlib import Path

import pytest

import timm_coretune
from timm_coretune.train import classification, segmentation

PACKAGE = 'timm_coretune'
ROOT = Path(timm_coretune.__file__).parent
# A room or module imports from those above it in this list, or from its own room.
TIERS = [
    ('version', 'lazy', 'atomic', 'checks', 'distributed', 'redaction'),
    ('model_config',),
    ('run_folder', 'timm_model', 'data', 'averaging/weights'),
    ('averaging/__init__',),
    ('mining', 'evaluation', 'lora'),
    ('mixup',),
    ('loss', 'checkpoint', 'export', 'report'),
    ('task', 'hub'),
    ('cached_step',),
    ('segmentation/data',),
    ('segmentation/convert',),
    ('segmentation/anchors', 'segmentation/decoder', 'segmentation/dense', 'segmentation/eomt'),
    ('segmentation/feature_maps', 'segmentation/locate', 'segmentation/outputs'),
    ('segmentation/description',),
    ('segmentation/model',),
    ('segmentation/task', 'segmentation/export', 'segmentation/predict'),
    ('segmentation/__init__', 'segmentation/__main__', 'register'),
    ('integrations', 'prediction'),
    ('deployment',),
    ('__init__',),
    ('train/cli', 'train/preemption'),
    ('train/data',),
    ('train/image_size', 'train/weights'),
    ('train/freezing', 'train/loop_config', 'train/loss_meter', 'train/processes', 'train/model'),
    ('train/watching',),
    ('train/optimization', 'train/loop'),
    ('train/run', 'train/classification', 'train/segmentation', 'train/notebook'),
    ('report/look',),
    ('report/examine',),
    ('report/contents',),
    ('report/create',),
    ('train/session', 'report/__main__'),
    ('train/__main__', 'train/replay'),
    ('train/__init__',),
    ('averaging',),
    ('__main__',),
]
LEVELS = {unit: level for level, tier in enumerate(TIERS) for unit in tier}
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob('*.py'))}


def unit_of(file):
    """What has a level: a room, or a module outside of the rooms."""
    parts = Path(file).with_suffix('').parts
    names = ['/'.join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in LEVELS), names[0])


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


def file_of(name):
    """The file of the package that an imported name is from."""
    parts = name.split('.')[1:]
    for length in range(len(parts), -1, -1):
        path = '/'.join(parts[:length])
        for file in (f'{path}.py', f'{path}/__init__.py'.lstrip('/')):
            if file in FILES:
                return file
    raise AssertionError(name)


def imported_units(source, file):
    names = [name for name in imported_modules(source, file) if name.split('.')[0] == PACKAGE]
    return {unit_of(file_of(name)) for name in names}


def violations(source, file):
    own = unit_of(file)
    is_room = (ROOT / own).is_dir()
    found = {unit for unit in imported_units(source, file) if LEVELS[unit] >= LEVELS[own]}
    if is_room:
        found.discard(own)
    accelerates = any(name.split('.')[0] == 'accelerate' for name in imported_modules(source, file))
    return found | ({'accelerate'} if accelerates and not file.startswith(('train/', 'prediction/__main__')) else set())


def test_every_module_has_a_level():
    assert {unit_of(file) for file in FILES} == set(LEVELS)


@pytest.mark.parametrize('file', FILES)
def test_a_module_imports_only_what_lies_below_it(file):
    assert violations(FILES[file].read_text(), file) == set()


def test_the_known_imports_are_seen():
    read = {file: imported_units(path.read_text(), file) for file, path in FILES.items()}
    assert read['mining/__init__.py'] == {'checks', 'mining'}
    assert {'mining', 'mixup', 'distributed', 'timm_model'} <= read['loss/core_tuning.py']
    assert {'loss', 'timm_model', 'mixup'} <= read['task.py']
    assert {'loss', 'mixup', 'task'} <= read['register.py']
    assert {'register', 'version'} <= read['__init__.py']
    assert {'train/cli', 'train/run', 'train/classification', 'train/segmentation'} <= read['train/session.py']


@pytest.mark.parametrize(
    'source, file, expected',
    [
        ('from .loss import CoreTuningLoss', 'mining.py', {'loss'}),
        ('from . import loss', 'mixup.py', {'loss'}),
        ('from .register import register', 'mixup.py', {'register'}),
        ('def f():\n    from ..task import CoreTuningTask', 'loss/core_tuning.py', {'task'}),
        ('from timm_coretune import CoreTuningTask', 'task.py', {'__init__'}),
        ('import timm_coretune.train.loop', 'hub/push.py', {'train/loop'}),
        ('from ..task import CoreTuningTask', 'checkpoint/load.py', {'task'}),
        ('from ..mining import normalize\nfrom .rules import KEY_RULES', 'checkpoint/load.py', set()),
        ('from .. import CoreTuningTask\nfrom accelerate import Accelerator', 'train/loop.py', set()),
        ('from ..run.record import RunRecord', 'train/data/loaders.py', {'train/run'}),
        ('from . import classification', 'train/segmentation.py', {'train/classification'}),
        ('from .segmentation import open_datasets', 'train/loop.py', {'train/segmentation'}),
        ('from ..model import SegmentationModel', 'segmentation/data/masks.py', {'segmentation/model'}),
        ('import accelerate.utils', 'task.py', {'accelerate'}),
        ('import torch', 'task.py', set()),
    ],
)
def test_imports_against_the_order_would_be_noticed(source, file, expected):
    assert violations(source, file) == expected


def test_no_folder_holds_more_than_15_modules():
    # beside __init__.py and __main__.py, which every package has
    counts = {folder: len(list(folder.glob('[!_]*.py'))) for folder in {path.parent for path in FILES.values()}}
    assert max(counts.values()) <= 15, counts


def test_images_and_pixels_offer_the_same_functions():
    kinds = [
        {
            name: [(p.name, p.kind) for p in inspect.signature(value).parameters.values() if p.default is p.empty]
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != '_'
        }
        for module in (classification, segmentation)
    ]
    only_of_images = kinds[0].keys() - kinds[1].keys()
    assert only_of_images == set()
    assert {name: kinds[0][name] for name in kinds[1]} == kinds[1]
    assert len(kinds[1]) == 10
    assert {classification.CONFIG, segmentation.CONFIG} == {'config.json', 'segmentation.json'}
