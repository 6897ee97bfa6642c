"""`import timm_coretune` and `train.py --help` import what they need; other names are imported at their first use."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

# what timm does not import, and what takes long
HEAVY = {
    'accelerate',
    'datasets',
    'lightning',
    'matplotlib',
    'pandas',
    'scipy',
    'sklearn',
    'torchmetrics',
    'transformers',
    'wandb',
}
HELP = """import contextlib, io, runpy
sys.argv = ['train.py', '--help']
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
    runpy.run_path('train.py', run_name='__main__')
assert '--coretune' in printed.getvalue()"""


def loaded_modules(statement):
    """Modules that a fresh interpreter has loaded after a statement."""
    source = f'import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))'
    command = [sys.executable, '-c', source]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    'statement, needed, left_out',
    [
        (
            'import timm_coretune',
            'register',
            'checkpoint data evaluation export hub integrations prediction report segmentation train',
        ),
        (HELP, 'train.cli.arguments', 'checkpoint hub prediction report segmentation.task train.session train.loop'),
    ],
    ids=['import', 'help'],
)
def test_nothing_is_imported_that_is_not_needed(statement, needed, left_out):
    loaded = loaded_modules(statement)
    assert f'timm_coretune.{needed}' in loaded
    assert loaded & {f'timm_coretune.{name}' for name in left_out.split()} == set()
    assert {name.split('.')[0] for name in loaded - loaded_modules('import timm, timm.task')} & HEAVY == set()


def lazy_names_of(package):
    """Names that a package declares to type checkers, and names that it imports at their first use, by module."""
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text())
    (declarations,) = (node.body for node in tree.body if isinstance(node, ast.If))
    declared = [(node.module, alias.name) for node in declarations for alias in node.names]
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func.id == 'lazy_names')
    offered = ast.literal_eval(call.args[1])
    return declared, [(module, name) for module, names in offered.items() for name in names]


@pytest.mark.parametrize('package', ['timm_coretune', 'timm_coretune.segmentation', 'timm_coretune.train'])
def test_names_imported_at_their_first_use_are_those_that_type_checkers_know(package):
    declared, offered = lazy_names_of(package)
    module = importlib.import_module(package)
    assert sorted(declared) == sorted(offered)
    for place, name in offered:
        assert getattr(module, name) is getattr(importlib.import_module(f'{package}.{place}'), name)
        assert name in dir(module)
        assert not (ROOT / package.replace('.', '/') / f'{name}.py').exists()  # it would take the place of the name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize('library, name', [('transformers', 'CoreTuningTrainer'), ('lightning', 'CoreTuningModule')])
def test_integrations_name_the_extra_of_a_missing_library(monkeypatch, library, name):
    declared, offered = lazy_names_of('timm_coretune.integrations')
    assert sorted(declared) == sorted(offered)
    (module,) = (module for module, offered_name in offered if offered_name == name)
    integrations = importlib.import_module('timm_coretune.integrations')
    assert name in dir(integrations)
    for loaded in [loaded for loaded in sys.modules if loaded.split('.')[0] == library]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(sys.modules, f'timm_coretune.integrations.{module}', raising=False)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"{name} needs {library} .*: pip install 'timm-coretune\[{library}\]'"):
        getattr(integrations, name)


@pytest.mark.slow
def test_a_room_is_an_attribute_without_an_import_of_its_own():
    loaded = loaded_modules('import timm_coretune\ntimm_coretune.checkpoint.load_checkpoint')
    assert 'timm_coretune.checkpoint.load' in loaded
    assert 'timm_coretune.hub' not in loaded
