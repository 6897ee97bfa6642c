"""What is shipped: the wheel's files, and examples that run as they are"""

import shutil
import subprocess
import sys
import zipfile

import pytest
from paths import ROOT

# tests/integrations runs those of other libraries, whose import takes long
OF_LIBRARIES = {'accelerate_loop', 'fabric_loop', 'lightning_module', 'transformers_trainer'}
ALL_EXAMPLES = {path.stem: path for path in sorted((ROOT / 'examples').glob('*.py'))}
EXAMPLES = [path for name, path in ALL_EXAMPLES.items() if name not in OF_LIBRARIES]


def test_the_wheel_holds_the_package_and_no_tests(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    source = tmp_path / 'source'
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info')
    for name in ('timm_coretune', 'tests', 'examples', 'benchmarks', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE', 'train.py'):
        shutil.copy(ROOT / name, source)
    code = f'from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})'
    subprocess.run([sys.executable, '-c', code], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.stat().st_size < 8e6
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    files = [path for path in (ROOT / 'timm_coretune').rglob('*') if path.is_file() and '__pycache__' not in path.parts]
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert 'timm_coretune/py.typed' in packed


def test_there_is_an_example_of_every_kind():
    assert ALL_EXAMPLES.keys() == OF_LIBRARIES | {'plain_loop', 'timm_loop', 'tune_and_export'}
    sources = ''.join(path.read_text() for path in (ROOT / 'tests' / 'integrations').glob('*.py'))
    assert [name for name in OF_LIBRARIES if f'{name}.py' not in sources] == []


@pytest.mark.slow
@pytest.mark.parametrize('example', EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_is(example, launch, tmp_path):
    printed = launch([sys.executable, '-W', 'ignore', str(example)]).stdout
    if example.stem == 'plain_loop':
        assert float(printed.split('accuracy ')[-1].split()[0]) > 60  # chance: 10
    if example.stem == 'tune_and_export':
        assert float(printed.split('accuracy ')[1].split()[0]) > 60
        assert (tmp_path / 'output' / 'exported' / 'model.safetensors').stat().st_size > 0
