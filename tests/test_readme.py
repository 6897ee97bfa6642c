"""The README's commands and loops run as they are written"""

import re
import shlex
import sys

import pytest
from paths import ROOT

README = (ROOT / 'README.md').read_text()
SHELL_COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', README, re.DOTALL) for line in block.splitlines()]
PYTHON_BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_commands_are_those_that_are_run_here_or_by_ci():
    assert SHELL_COMMANDS == [
        "pip install -e '.[vis]'",
        'accelerate launch train.py --coretune --report',
        'accelerate launch train.py --segmentation --coretune',
        "pip install -e '.[test]'",
        'pytest -n 2',
    ]
    ci = (ROOT / '.ci' / 'run').read_text()
    assert "-e '.[test]'" in ci
    assert '\npytest -n 2\npytest -n 2 -m slow\n' in ci


@pytest.mark.slow
@pytest.mark.parametrize('extra', [[], ['--model', 'resnet50']], ids=['as-written', 'resnet50'])
def test_the_main_command_trains_on_the_sample(launch, tmp_path, extra, read_csv):
    command = SHELL_COMMANDS[1].replace('train.py', str(ROOT / 'train.py'))
    words = shlex.split(command)
    flags = ['--epochs', '1', '--output', str(tmp_path), '--experiment', 'run']
    if extra:
        flags += ['--label-fraction', '0.25']
    log = launch([*words, *extra, *flags]).stderr
    assert 'using the bundled Fashion-MNIST sample' in log
    assert ('its contrastive checkpoint' in log) == (not extra)
    (row,) = read_csv(tmp_path / 'run' / 'summary.csv')
    assert {'train_loss', 'train_task', 'train_contrast', 'eval_top1', 'lr'} <= row.keys()
    # a few updates from scratch are near the 10 % of chance, an epoch from the contrastive checkpoint is far above
    assert float(row['eval_top1']) > (0 if extra else 60)
    assert '*** Best metric: ' in log
    for name in ('model_best.safetensors', 'last.pth.tar', 'args.yaml', 'curves.png', 'report.html'):
        assert (tmp_path / 'run' / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize('block', PYTHON_BLOCKS, ids=['plain-pytorch-loop', 'timm-loop', 'notebook'])
def test_a_loop_runs_as_copied(block, launch):
    # a fresh interpreter, where nothing else has imported a part of timm
    check = "\nassert (result['loss'] if 'result' in dir() else loss).isfinite()" if 'results' not in block else ''
    launch([sys.executable, '-W', 'ignore', '-c', block + check])


def test_links_to_this_repository_lead_to_files_and_headings():
    """PyPI and the site show the README too, where a relative link leads nowhere."""
    base = 'https://github.com/timm-coretune/timm_coretune/blob/main/'
    links = re.findall(r'\]\(([^)]+)\)', README) + re.findall(r'^\[[^]]+\]: (\S+)', README, re.MULTILINE)
    assert all(link.startswith('https://') for link in links)
    own = [link.removeprefix(base) for link in links if link.startswith(base)]
    assert len(own) > 10
    for link in own:
        path, _, heading = link.partition('#')
        assert (ROOT / path).exists(), link
        titles = re.findall(r'^#+ (.*)', (ROOT / path).read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [title.lower().replace(' ', '-') for title in titles], link


def test_flags_that_are_named_exist():
    """In the README and in pages that are written by hand, against the flags of all commands."""
    sources = [path for name in ('timm_coretune', 'scripts', 'benchmarks') for path in (ROOT / name).rglob('*.py')]
    known = {flag for path in sources for flag in re.findall(r"'(--[a-z][a-z-]+)'", path.read_text())}
    known |= set(re.findall(r'`(--[a-z][a-z-]+)`', (ROOT / 'docs' / 'flags.md').read_text()))
    known |= {'--config_file', '--unseen'}
    for path in (ROOT / 'README.md', ROOT / 'docs' / 'troubleshooting.md', ROOT / 'docs' / 'walkthrough.md'):
        text = re.sub(r'```text\n.*?```', '', path.read_text(), flags=re.DOTALL)  # of other programs
        named = set(re.findall(r'(?<![\w-])--[a-z][a-z_-]+', text))
        assert named - known == set(), path


def test_the_plain_loop_differs_from_a_plain_one_in_at_most_five_lines():
    loop = PYTHON_BLOCKS[0].split('\n\n')[-1].strip().splitlines()
    plain = {
        'for images, target in loader:',
        '    loss.backward()',
        '    optimizer.step()',
        '    optimizer.zero_grad()',
    }
    assert len([line for line in loop if line not in plain]) <= 5
