"""Nothing that a run writes, prints or sends holds a password, a token, a signature or a home folder"""

import base64
import contextlib
import dataclasses
import io
import json
import logging
import os
import shlex
import shutil
import sys
import time

import matplotlib
import pytest
import timm
import torch
import yaml
from hub_server import TOKEN, connect_client
from runs import SMALL, copy_of, stop_at
from safetensors.torch import load_file
from timm.utils import setup_default_logging
from tiny_data import write_folders

from timm_coretune import load_checkpoint
from timm_coretune.hub.__main__ import main as hub_main
from timm_coretune.redaction import (
    REDACTED,
    _excepthook,
    expand_home,
    join_command,
    redact,
    redact_values,
    redacted_output,
    remember,
    strip_path,
)
from timm_coretune.train import main
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.settings import OutputSettings, Settings
from timm_coretune.train.processes import start_trackers

PASSWORD = "tr0ub4dor'&3"
# what a URL, a tracker and an environment have
SECRETS = {
    'password': PASSWORD,
    'signature': 'f00dfeedf00dfeed',
    'sas': 'Zm9vYmFy%2Bb3M%3D',
    'credential': 'AKIAIOSFODNN7EXAMPLE',
    'session': 'FwoGZXIvYXdzEXAMPLE',
    'hub': 'hf_ZyXwVuTsRqPoNmLkJiHgFeDcBa',
    'api': '0123456789abcdef0123456789abcdef01234567',
    'short': 'S1',
}
QUERY = (
    'X-Amz-Algorithm=AWS4&X-Amz-Credential={credential}%2F20260101&X-Amz-Signature={signature}&Signature={signature}'
    '&X-Amz-Security-Token={session}&AWSAccessKeyId={credential}&sv=2024&sig={sas}&token={hub}&k={short}&download=1'
).format(**SECRETS)

FONTS = matplotlib.get_cachedir()  # they take long to find again

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with data, in which everything is below a name that is found nowhere else."""
    home = tmp_path / 'alice-in-chains'
    home.mkdir()
    monkeypatch.setenv('HOME', str(home))
    for name in ('TORCH_HOME', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('MPLCONFIGDIR', FONTS)
    write_folders(
        home / 'pets of mine', {f'{split}/{name}': 8 for split in ('train', 'val') for name in ('cat', 'dog')}
    )
    return home


@pytest.fixture
def url(server):
    """A URL with secrets, whose file the server has."""
    stream = io.BytesIO()
    encoder = timm.create_model('test_resnet', num_classes=0)
    torch.save({'state_dict': {f'module.encoder_q.{k}': v for k, v in encoder.state_dict().items()}}, stream)
    server.files['/secret-free/moco.pth'] = stream.getvalue()
    place = server.url.removeprefix('http://')
    return f'http://user:{PASSWORD}@{place}/secret-free/moco.pth?{QUERY}#access_token={SECRETS["api"]}'


@pytest.fixture
def hub(server, monkeypatch):
    connect_client(server, monkeypatch)
    monkeypatch.setattr(time, 'sleep', lambda _: None)
    return server


def leaks(home, *contents):
    """The secrets, and names of them, that are in texts or bytes."""
    tokens = {**SECRETS, 'k': 'k=S1', 'token': TOKEN, 'login': base64.b64encode(f'user:{PASSWORD}'.encode()).decode()}
    wanted = {**tokens, 'home': home.name}
    wanted.pop('short')
    contents = [text.encode() if isinstance(text, str) else text for text in contents]
    return {name for name, secret in wanted.items() if any(secret.encode() in content for content in contents)}


def written(*folders):
    """Names and bytes of all files below folders."""
    paths = [path for folder in folders for path in sorted(folder.rglob('*')) if path.is_file()]
    assert paths
    return [part for path in paths for part in (os.path.relpath(path, folders[0].parent), path.read_bytes())]


def trains(home, url, *flags):
    words = ('--data-dir', home / 'pets of mine', '--pretrained-path', url, '--output', home / 'my runs')
    words += ('--experiment', 'run', *SMALL, '--device', 'cpu', '--epochs', '1', '--check-images', 'none', '--coretune')
    return [str(word) for word in (*words, *flags)]


@pytest.mark.slow
def test_a_run_and_its_push_keep_secrets_and_the_home_folder_to_themselves(hub, home, url, capfd, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv('WANDB_API_KEY', SECRETS['api'])
    (home / 'names.txt').write_text('cat\ndog\n')
    tags = [f'WANDB_API_KEY={SECRETS["api"]}', SECRETS['hub'], f'at {home}/x', url]
    flags = [
        '--class-map',
        home / 'names.txt',
        '--wandb-tags',
        *tags,
        '--log-with',
        'tensorboard',
        '--metrics',
        'confusion,per-class',
    ]
    flags += ['--wandb-project', f'api_key={SECRETS["api"]}', '--save-images', '--recovery-interval', '1']
    argv = trains(home, url, *flags, '--push-to-hub', 'me/tuned')
    monkeypatch.setattr(sys, 'argv', [str(home / 'bin' / 'train.py'), *argv])
    stop_at(monkeypatch, 'train_one_epoch', 1)
    with pytest.raises(
        SystemExit
    ) as ended:  # interrupted, so the log has the command that continues, and is not pushed
        main([*argv, '--epochs', '2'])
    assert ended.value.code == 3
    del ended  # it holds the lock of the folder
    run = home / 'my runs' / 'run'
    assert hub.logins == [f'Basic {base64.b64encode(f"user:{PASSWORD}".encode()).decode()}']
    monkeypatch.undo()  # Ctrl-C
    monkeypatch.setenv('HOME', str(home))
    connect_client(hub, monkeypatch)

    # the log has a command whose paths a shell finds, and args.yaml needs no secret to continue
    command = next(r.getMessage() for r in caplog.records if 'Continue with' in r.getMessage()).splitlines()[1]
    words = [os.path.expanduser(word) for word in shlex.split(command)]
    assert words[2] == str(home / 'bin' / 'train.py')
    assert words[words.index('--data-dir') + 1] == str(home / 'pets of mine')
    before = load_file(run / 'model_best.safetensors')
    again = ['-c', '~/my runs/run/args.yaml', '--resume', 'auto', '--push-to-hub', 'me/tuned']
    with pytest.raises(SystemExit):
        main(again)
    assert '--wandb-project, --wandb-tags: secrets were left out' in capfd.readouterr().err
    kept = written(run, home / '.cache')
    shutil.rmtree(home / '.cache' / 'torch')  # as on another machine
    main([*again, '--wandb-project', 'pets', '--wandb-tags', 'pet', '--checkpoint-hist', '3'])
    assert len(hub.logins) == 1
    assert json.loads((run / 'config.json').read_text())['pretrained_cfg']['mean'] == [0.485, 0.456, 0.406]
    assert len((run / 'summary.csv').read_text().splitlines()) == 3
    assert load_file(run / 'model_best.safetensors').keys() == before.keys()

    files = hub.repositories['me/tuned'].files()
    assert {'args.yaml', 'config.json', 'README.md', 'summary.csv', 'curves.png', 'confusion.csv'} <= set(files)
    sent = [*files, *files.values(), *hub.received, *(path for _, path in hub.requests)]
    printed = capfd.readouterr()
    assert '~/my runs/run' in printed.err
    kept += written(run)
    assert any('tfevents' in name for name in kept[::2])
    for contents in (sent, [*printed, caplog.text, command], kept):
        assert leaks(home, *contents) == set()
    settings = yaml.safe_load(files['args.yaml'])
    assert (settings['data_dir'], settings['output'], settings['epochs']) == ('pets of mine', 'my runs', 2)
    assert settings['pretrained_path'].startswith(f'http://{REDACTED}@127.0.0.1:')
    assert yaml.safe_load((run / 'args.yaml').read_text())['data_dir'] == '~/pets of mine'
    assert 'the checkpoint `moco.pth`' in files['README.md'].decode()
    (changed,) = (
        line for line in set(printed.err.splitlines()) if 'with other arguments than those of the state' in line
    )
    assert not any(name in changed for name in ('pretrained_path', 'data_dir', 'class_map'))


def test_the_folder_of_an_earlier_version_is_pushed_without_its_secrets(hub, home, url, run_folder, capfd):
    folder = copy_of(run_folder, home)
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    args.update(
        data_dir=str(home / 'pets'),
        pretrained_path=url,
        output='/shared/of the company/runs',
        dataset='hfds//shared/of the company/pets',
        wandb_tags=[url],
    )
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'] = {'api_key': 12, 'secret': SECRETS['api'], 'file': f'{home}/x'}
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'args.yaml').write_text(f'# from {home}\n{yaml.safe_dump(args)}# in this run: {url}\n')
    hub_main(['push', '~/run', 'me/tuned'])
    files = hub.repositories['me/tuned'].files()
    assert leaks(home, *files.values(), *capfd.readouterr(), *hub.received) == set()
    assert b'company' not in files['args.yaml'] + files['README.md']
    assert json.loads(files['config.json'])['model_args'] == {'api_key': 12, 'secret': REDACTED, 'file': '~/x'}
    assert {'epochs': 2, 'output': 'runs', 'data_dir': 'pets'}.items() <= yaml.safe_load(files['args.yaml']).items()
    assert files['args.yaml'].startswith(b'# from ~\n')


def fails(home, url, capfd, *flags):
    """The type of an error, and all that it says."""
    with pytest.raises((Exception, SystemExit)) as failed:
        main(trains(home, url, *flags))
    _excepthook(failed.type, failed.value, failed.tb)
    return failed.type, [*capfd.readouterr(), str(failed.value), repr(failed.value)]


def test_no_error_of_a_run_tells_a_secret_or_the_home_folder(hub, home, url, capfd, caplog):
    hub.files['/page'] = b'<html>'
    for flags in (
        ['--pretrained-path', url.replace('moco', 'none')],
        ['--pretrained-path', url.replace('http:', 'ftp:')],
        ['--pretrained-path', url.replace('http://', '/')],
        ['--pretrained-path', f'{home}/{SECRETS["hub"]}.pth'],
        ['--pretrained-path', f'{hub.url}/page?token={SECRETS["hub"]}'],
        ['--initial-checkpoint', url.replace('127.0.0.1', 'example.com')],
        ['--data-dir', f'{home}/none'],
        ['--class-map', f'{home}/none'],
        ['--resume', f'{home}/none'],
        ['--output', f'{home}/pets of mine/train/cat/0.png'],
        ['--epochs', SECRETS['hub']],
        ['--no-such-flag', url],
        ['-c', f'{home}/none'],
        ['--model', f'{home}/pets of mine'],
        ['--opt', SECRETS['hub']],
        ['--log-with', SECRETS['hub']],
    ):
        _, said = fails(home, url, capfd, *flags)
        assert any(text.strip() for text in said)
        assert leaks(home, *said, caplog.text) - {'k'} == set(), (flags, said)


STRINGS = [
    f.name
    for group in dataclasses.fields(Settings)
    for f in dataclasses.fields(group.default_factory)
    if any(kind in str(f.type) for kind in ('str', 'Dict')) and 'Literal' not in str(f.type)
]


def test_every_setting_is_written_and_refused_without_its_secrets(home, url, capfd):
    told = []
    with redacted_output():
        for name in STRINGS:
            value = f'api_key={url}' if name.endswith('kwargs') else f'{home}/{SECRETS["hub"]} {url} {PASSWORD}'
            try:
                parsed = parse_args(['--data-dir', 'x', f'--{name.replace("_", "-")}', value])
            except SystemExit:  # refused by the parser, whose words are looked at below
                pass
            else:
                told.append(f'{parsed.text}{redact_values(parsed.settings.flat())}')
    assert len(STRINGS) > 40
    assert len(told) > 30
    assert all(REDACTED in text for text in told)
    assert leaks(home, *told, *capfd.readouterr()) == set()


# one text at a time


@pytest.mark.parametrize(
    'text, expected',
    [
        ('https://user:pw@host/m.pth?X-Amz-Signature=S', 'https://REDACTED@host/m.pth?X-Amz-Signature=REDACTED'),
        ("got 'https://h/a?sig=b&download=1', try", "got 'https://h/a?sig=REDACTED&download=1', try"),
        ("('https://u:p'w/x#?@h:80/a')", "('https://REDACTED@h:80/a')"),
        ('s3://key:secret@bucket/a', 's3://REDACTED@bucket/a'),
        ('https://h/a?bare-key#part', 'https://h/a?REDACTED#part'),
        ('https://mega.nz/file/a#Kj3-x', 'https://mega.nz/file/a#REDACTED'),
        ('https://h/resolve/main/a@b.pth?download=true#usage', 'https://h/resolve/main/a@b.pth?download=true#usage'),
        ('http://[::1]:80/a@b', 'http://[::1]:80/a@b'),
        ('a hf_aBcDeFgHiJkL b', 'a REDACTED b'),
        ('hf_hub_download of hf-hub:owner/name', 'hf_hub_download of hf-hub:owner/name'),
        ('WANDB_API_KEY=0123456789', 'WANDB_API_KEY=REDACTED'),
        ("{'aws_secret_access_key': 'abcdefgh', 'b': 1}", "{'aws_secret_access_key': 'REDACTED', 'b': 1}"),
        ('Authorization: Bearer abc.def-ghi', 'Authorization: REDACTED REDACTED'),
        ('cls_token: missing, class_token=tensor', 'cls_token: missing, class_token=tensor'),
        ('--checkpoint-key encoder_k, input_key: image', '--checkpoint-key encoder_k, input_key: image'),
        ('AccountKey=Zm9vYmFyCg==;x', 'AccountKey=REDACTED;x'),
        ('/home/bob/x and /Users/eve, C:\\Users\\dan\\y', '~bob/x and ~eve, ~dan\\y'),
        ('/mnt/home/bob, https://h/home/page', '/mnt/home/bob, https://h/home/page'),
    ],
)
def test_what_is_secret_is_replaced_and_nothing_else(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


def test_the_home_folder_is_a_tilde_where_it_begins_a_path(home, tmp_path):
    text = f"'{home}', {home}/a, local-dir:{home}/b, {home}-2/c, /x{home}/d, {home}."
    expected = f"'~', ~/a, local-dir:~/b, {home}-2/c, /x{home}/d, ~."
    assert redact(text) == expected
    for path in (f'{home}/a b/~c', f'hfds/{home}/d', f'local-dir:{home}', 'a~b', '~nobody/x', str(tmp_path)):
        assert expand_home(redact(path)) == path
    assert join_command(['python', f'{home}/my x.py', '', f'--a={home}']) == "python ~/'my x.py' '' '--a=~'"


@pytest.mark.parametrize(
    'text, expected',
    [
        *[('/data/of us/x', 'x'), ('hfds//data/x', 'hfds/x'), ('local-dir:/a/b/', 'local-dir:b'), ('../../x', 'x')],
        *[('./output/train', './output/train'), ('data/x', 'data/x'), ('hfds/owner/name', 'hfds/owner/name')],
        *[('C:\\data\\x', 'x'), ('https://h/a/b', 'https://h/a/b'), ('', ''), ('0.1', '0.1')],
    ],
)
def test_published_settings_have_no_paths_of_the_machine(text, expected):
    assert strip_path(text) == expected


def test_errors_and_what_led_to_them_are_redacted_with_their_tracebacks(home, capsys, caplog):
    remember({'password': PASSWORD})

    @redacted_output()
    def program():
        try:
            (home / 'a').read_text()
        except OSError as e:
            logging.getLogger('any').exception('failed with %s at %s', PASSWORD, home)
            raise ValueError(f'{PASSWORD} in {home}/b') from e

    with pytest.raises(ValueError, match='~/b') as failed:
        program()
    assert failed.value.__cause__.filename == '~/a'
    _excepthook(failed.type, failed.value, failed.tb)
    assert leaks(home, capsys.readouterr().err, caplog.text) == set()
    assert sys.stdout is not None
    print(home)  # no longer redacted
    assert str(home) in capsys.readouterr().out


@pytest.mark.parametrize(
    'error',
    [OSError('full'), OSError(28, 'full'), OSError(28, 'full', 'a'), KeyError('a'), ValueError(), SystemExit(3)],
    ids=repr,
)
def test_an_error_without_secrets_says_what_it_said(error):
    said = str(error), repr(error), error.args
    with pytest.raises(type(error)), redacted_output():
        raise error
    assert (str(error), repr(error), error.args) == said


def test_a_second_program_of_a_process_logs_every_line_once(monkeypatch):
    monkeypatch.setattr(logging.root, 'handlers', list(logging.root.handlers))

    @redacted_output()
    def program():
        setup_default_logging()
        logging.getLogger('any').warning('said once')

    written = []
    for _ in range(3):
        with io.StringIO() as stream, contextlib.redirect_stderr(stream):  # closed at the end
            program()
            logging.getLogger('any').warning('and after it')
            written.append(stream.getvalue())
    assert written == ['WARNING: said once\nWARNING: and after it\n'] * 3


def test_a_tracker_sees_a_command_line_without_secrets(home, url, monkeypatch):
    seen = []

    class Accelerator:
        log_with = ('wandb',)
        project_configuration = OutputSettings

        def init_trackers(self, *args, **kwargs):
            seen.append(f'{sys.argv} {args} {kwargs}')

    monkeypatch.setattr(OutputSettings, 'logging_dir', None, raising=False)
    monkeypatch.setattr(sys, 'argv', ['train.py', url, str(home)])
    output = OutputSettings(wandb_project=url, wandb_tags=[url, f'{home}/x'])
    start_trackers(output, redact_values({'pretrained_path': url}), Accelerator(), f'{home}/run')
    assert leaks(home, *seen) == set()
    assert sys.argv[1] == url


def test_a_checkpoint_is_reported_without_the_secrets_of_its_url(hub, home, url, caplog):
    caplog.set_level(logging.INFO)
    report = load_checkpoint(timm.create_model('test_resnet'), url)
    with pytest.raises(ValueError, match='Expected') as failed:
        load_checkpoint(timm.create_model('test_vit'), url)
    assert leaks(home, str(report), report.line(), str(failed.value)) == set()
    assert leaks(home, caplog.text) <= {'home'}  # a program shortens it
