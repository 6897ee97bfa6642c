"""The one command in front of all others, and the names under which it is installed"""

import configparser
import importlib
import sys
from pathlib import Path

import pytest

import timm_coretune
from timm_coretune.__main__ import COMMANDS, main
from timm_coretune.train.run.finish import continue_command


@pytest.fixture
def calls(monkeypatch):
    """What the `main` behind each command was called with, in place of doing it."""
    calls = []
    for command in COMMANDS.values():
        module = importlib.import_module(command.module)

        def record(arguments, name=command.module):
            calls.append((name, arguments))
            return object()  # as the report that inspecting a checkpoint returns

        monkeypatch.setattr(module, 'main', record, raising=False)
    return calls


@pytest.mark.parametrize(
    'words, module, arguments',
    [
        ('train --coretune --lr 0.1', 'train.__main__', ['--coretune', '--lr', '0.1']),
        ('predict RUN IMAGES --output MASKS', 'prediction.__main__', ['RUN', 'IMAGES', '--output', 'MASKS']),
        ('evaluate RUN', 'train.__main__', ['--eval-only', '--model', 'RUN']),
        ('evaluate RUN DIR --amp', 'train.__main__', ['--eval-only', '--model', 'RUN', '--data-dir', 'DIR', '--amp']),
        ('evaluate RUN DIR x', 'train.__main__', ['--eval-only', '--model', 'RUN', '--data-dir', 'DIR', 'x']),
        ('evaluate --model RUN', 'train.__main__', ['--eval-only', '--model', 'RUN']),
        ('report RUN', 'report.__main__', ['RUN']),
        ('average RUN --output DIR', 'averaging.__main__', ['RUN', '--output', 'DIR']),
        ('export RUN --format onnx', 'deployment.__main__', ['RUN', '--format', 'onnx']),
        ('sample FOLDER', 'segmentation.__main__', ['sample', 'FOLDER']),
        ('masks convert ade20k DIR', 'segmentation.convert.__main__', ['convert', 'ade20k', 'DIR']),
        ('checkpoint inspect FILE', 'checkpoint.__main__', ['inspect', 'FILE']),
        ('hub push RUN owner/name', 'hub.__main__', ['push', 'RUN', 'owner/name']),
        ('hub --help', 'hub.__main__', ['--help']),
    ],
)
def test_a_command_gets_the_words_behind_it(words, module, arguments, calls, monkeypatch):
    assert main(words.split()) is None  # a console script exits with what is returned
    monkeypatch.setattr(sys, 'argv', ['timm-coretune', *words.split()])
    main()
    assert calls == 2 * [(f'timm_coretune.{module}', arguments)]


@pytest.mark.parametrize('name', COMMANDS)
def test_what_a_command_calls_exists(name):
    assert callable(importlib.import_module(COMMANDS[name].module).main)


@pytest.mark.parametrize('word', ['-h', '--help'])
def test_help_names_every_command(word, calls, capsys):
    main([word])
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f'  {name} ' in printed
        assert command.help in printed
    assert calls == []


def test_the_version_is_that_of_the_package(calls, capsys):
    main(['--version'])
    assert capsys.readouterr().out == f'timm_coretune {timm_coretune.__version__}\n'
    assert calls == []


@pytest.mark.parametrize(
    'words, reason',
    [
        ([], 'got none'),
        (['trian', '--coretune'], "got 'trian'. Did you mean train?"),
        (['--coretune'], "got '--coretune'."),
    ],
)
def test_an_unknown_command_is_refused_with_the_list_of_those_there_are(words, reason, calls, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert reason in printed.err
    assert all(f'  {name} ' in printed.err for name in COMMANDS)
    assert printed.out == ''
    assert calls == []


@pytest.mark.slow
def test_a_new_process_shows_the_help_and_the_exit_code_of_an_error(launch):
    launcher = [sys.executable, '-m', 'timm_coretune']
    assert launch([*launcher, '--help']).stdout.startswith('usage: timm-coretune COMMAND')
    assert launch([*launcher, 'nothing'], check=False).returncode == 2


def test_a_command_that_cannot_do_it_says_why_without_a_traceback(launch):
    command = [sys.executable, '-m', 'timm_coretune', 'checkpoint', 'inspect', 'nowhere.pth']
    finished = launch(command, check=False)
    assert finished.returncode in (1, 2)
    assert 'nowhere.pth' in finished.stderr
    assert 'Traceback' not in finished.stderr


def console_scripts():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / 'setup.cfg')
    lines = config['options.entry_points']['console_scripts'].split('\n')
    return dict(line.split(' = ') for line in lines if line)


def test_the_console_scripts_are_those_of_the_documentation():
    assert set(console_scripts()) == {'timm-coretune', 'timm-coretune-train'}


@pytest.mark.parametrize('target', console_scripts().values(), ids=console_scripts())
def test_a_console_script_calls_something_that_exists(target):
    module, _, name = target.partition(':')
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    'script, launched',
    [
        ('train.py', 'train.py'),
        ('my scripts/train.py', "'my scripts/train.py'"),
        ('/site-packages/timm_coretune/__main__.py', '-m timm_coretune.train'),
        ('/site-packages/timm_coretune/train/__main__.py', '-m timm_coretune.train'),
        ('/bin/timm-coretune', '-m timm_coretune.train'),
        ('/bin/timm-coretune-train', '-m timm_coretune.train'),
    ],
)
def test_an_interrupted_run_names_a_command_that_accelerate_can_launch(script, launched, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [script])
    expected = f'accelerate launch {launched} --coretune --output /runs --experiment one --resume auto'
    assert continue_command(['--coretune'], '/runs/one') == expected


WORDS = '--output /runs --experiment one --resume auto'


@pytest.mark.parametrize(
    'given, continued',
    [
        ('', WORDS),
        ('--coretune --experiment one', '--coretune --experiment one --output /runs --resume auto'),
        ('--experiment=one --output other DIR', '--experiment one --output /runs DIR --resume auto'),
        ('--resume old/last.pth.tar --no-resume-opt -b 4', '--resume auto -b 4 --output /runs --experiment one'),
        ('--start-epoch 3 --experiment x --experiment y', '--experiment one --output /runs --resume auto'),
        ('--start-epoch=3 --exp x --resu auto', '--experiment one --resume auto --output /runs'),
        ('--wandb-tags a b --output o DIR', '--wandb-tags a b --output /runs DIR --experiment one --resume auto'),
        ('-c x.yaml --lr 0.1', f'-c x.yaml --lr 0.1 {WORDS}'),
    ],
)
def test_the_command_that_continues_a_run_names_each_flag_once(given, continued, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    assert continue_command(given.split(), '/runs/one') == f'accelerate launch train.py {continued}'
