"""Pushes by the real client to a Hub on loopback: what arrives, what comes back, and what every failure leaves"""

import json
import re
import shlex
import shutil
import time

import huggingface_hub
import pytest
import timm
import torch
import yaml
from hub_server import SIGNATURE, TOKEN
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from runs import copy_of, train
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_data import write_folders

from timm_coretune import export_model, push_to_hub
from timm_coretune.hub import HubError, connection, push_run
from timm_coretune.hub.__main__ import run as run_cli
from timm_coretune.hub.upload import upload
from timm_coretune.prediction import FineTuned
from timm_coretune.train.cli.settings import OutputSettings
from timm_coretune.train.run.finish import push

DATA_CONFIG = dict(
    input_size=(3, 48, 48), interpolation='bilinear', mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), crop_pct=0.8,
    crop_mode='center',
)  # fmt: skip

NAMES = ['ant', 'bee', 'cat']

pytestmark = pytest.mark.usefixtures('one_thread')


def test_a_pushed_model_comes_back_as_a_plain_timm_model_and_the_code_of_its_card_runs(
    hub, plain_timm, tmp_path, model
):
    url = push_to_hub(model, 'me/my-model', data_config=DATA_CONFIG, label_names=NAMES)
    assert url.startswith(f'{hub.url}/me/my-model/commit/')
    files = hub.repositories['me/my-model'].files()
    assert set(files) == {'README.md', 'config.json', 'model.safetensors'}
    Image.new('RGB', (60, 50), (200, 30, 30)).save(tmp_path / 'image.png')
    code = files['README.md'].decode().split('```python\n')[1].split('```')[0]
    image = torch.randn(2, 3, 48, 48)
    output, config, printed = plain_timm('hf-hub:me/my-model', image, code)
    assert torch.equal(output, model(image))
    assert config == {**json.loads(json.dumps(DATA_CONFIG)), 'label_names': NAMES}
    assert printed[0].split()[0] in NAMES


def test_what_fine_tune_returns_is_pushed_with_its_names_preparation_and_scores(hub, model):
    epochs = [{'epoch': e, 'train': {}, 'validation': {'loss': 1.0, 'top1': 50.0 + e}} for e in range(2)]
    url = FineTuned(model, epochs, NAMES, DATA_CONFIG).push('me/tuned', private=True)
    assert url.startswith(f'{hub.url}/me/tuned/commit/')
    files = hub.repositories['me/tuned'].files()
    config = json.loads(files['config.json'])
    assert config['label_names'] == NAMES
    assert config['pretrained_cfg'].items() >= json.loads(json.dumps(DATA_CONFIG)).items()
    assert re.search(r'\| Top-1 accuracy.* \| 51 \|', files['README.md'].decode())
    assert hub.repositories['me/tuned'].private


@pytest.mark.slow
def test_the_classes_of_a_pushed_model_are_known_to_a_run_that_starts_from_it(hub, run_python, model):
    push_to_hub(model, 'me/my-model', label_names=NAMES)
    code = (
        'from timm_coretune.train.cli.settings import ModelSettings\n'
        'from timm_coretune.train.data.classes import read_model_classes\n'
        'print(*read_model_classes(ModelSettings(model="hf-hub:me/my-model", pretrained=True)))\n'
    )
    assert run_python(code).splitlines() == [f'{NAMES} 3 hf-hub:me/my-model False']


def test_an_exported_folder_comes_back_with_its_size_channels_and_names(tmp_path):
    model = timm.create_model('test_vit', num_classes=3, img_size=64, in_chans=1).eval()
    data_config = {**DATA_CONFIG, 'input_size': (1, 64, 64), 'mean': (0.5,), 'std': (0.5,)}
    compiled = torch.compile(model, backend='eager')
    export_model(compiled, str(tmp_path / 'exported'), data_config=data_config, label_names=NAMES)
    loaded = timm.create_model(f'local-dir:{tmp_path / "exported"}', pretrained=True).eval()
    image = torch.randn(2, 1, 64, 64)
    assert torch.equal(loaded(image), model(image))
    config = timm.data.resolve_data_config({}, model=loaded)
    assert json.loads(json.dumps(config)) == json.loads(json.dumps(data_config))  # tuples or lists
    assert loaded.pretrained_cfg['label_names'] == NAMES


def test_a_run_is_pushed_from_its_folder_alone(hub, run_folder, tmp_path):
    run_cli(['push', str(run_folder), 'me/run', '--license', 'mit'])
    files = hub.repositories['me/run'].files()
    assert set(files) == {'README.md', 'args.yaml', 'config.json', 'curves.png', 'model.safetensors', 'summary.csv'}
    for name, stored in files.items():
        local = run_folder / {'model.safetensors': 'model_best.safetensors'}.get(name, name)
        assert name in ('README.md', 'args.yaml') or stored == local.read_bytes()
    settings, local = (yaml.safe_load(text) for text in (files['args.yaml'], (run_folder / 'args.yaml').read_bytes()))
    assert {name for name in local if settings[name] != local[name]} == {'data_dir', 'pretrained_path', 'output'}
    assert settings['data_dir'] == 'fashion_mnist_sample.safetensors'
    assert settings['pretrained_path'] == 'test_resnet_mocov2.safetensors'
    (_, commit) = hub.repositories['me/run'].branches['main']  # one commit after the initial one
    assert commit[1] == 'Add tuned model'
    config = json.loads(files['config.json'])
    assert config['label_names'][:2] == ['T-shirt/top', 'Trouser']
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert config['pretrained_cfg']['crop_pct'] == 1.0
    assert not {'tag', 'license'} & set(config['pretrained_cfg'])  # those of the weights timm has of that name

    card = ModelCard(files['README.md'].decode())
    front = card.data.to_dict()
    assert (front['library_name'], front['license']) == ('timm', 'mit')
    assert {'timm', 'coretune', 'test_resnet'} <= set(card.data.tags)
    assert card.data.base_model is None
    assert 'the checkpoint `test_resnet_mocov2.safetensors`' in card.text
    assert 'the moving average (EMA) of the weights after epoch' in card.text
    assert "timm.create_model('hf-hub:me/run', pretrained=True)" in card.text
    assert 'arxiv.org/abs/2102.06605' in card.text
    assert '| `--contrast-weight` | 1.0 |' in card.text
    recipe = dict(re.findall(r'^\| `(--[\w-]+)` \| (.*) \|$', card.text, re.MULTILINE))
    shown = ('--model', '--pretrained-path', '--img-size', '--lr', '--batch-size')
    assert [recipe[name] for name in shown] == ['test_resnet', 'test_resnet_mocov2.safetensors', '32', '0.05', '64']
    assert '- Classes: `T-shirt/top`, `Trouser`, ' in card.text
    assert '](curves.png)' in card.text
    assert 'confusion.png' not in card.text
    assert '--amp-dtype' not in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    with safe_open(run_folder / 'model_best.safetensors', framework='pt') as weights:
        epoch = int(weights.metadata()['epoch'])
    row = (run_folder / 'summary.csv').read_text().splitlines()[1 + epoch].split(',')
    columns = (run_folder / 'summary.csv').read_text().splitlines()[0].split(',')
    top1 = float(row[columns.index('eval_top1')])
    assert results['accuracy'].metric_value == pytest.approx(top1, abs=1e-3)
    assert results['accuracy'].dataset_name == 'fashion_mnist_sample'


def test_the_card_has_the_learning_rate_that_the_run_came_to(hub, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / 'run')
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    text = yaml.safe_dump({**args, 'lr': None})
    (folder / 'args.yaml').write_text(f'{text}# in this run: lr 1.25e-05, eval_metric top1, num_classes 10\n')
    push_run(str(folder), 'me/run')
    text = hub.repositories['me/run'].files()['README.md'].decode()
    assert '| `--lr` | 1.25e-05 |' in text


@pytest.mark.skipif(Version(timm.__version__) < Version('1.0.31'), reason='timm could not choose among several files')
@pytest.mark.parametrize(
    'splits, measured',
    [(['train', 'test'], 'on the test split'), ([''], 'on the held-out (10 %) split')],
    ids=['test', 'held-out'],
)
def test_the_card_names_the_images_that_were_validated_on(hub, tmp_path, splits, measured):
    data = write_folders(tmp_path / 'data', {f'{s}/{name}'.lstrip('/'): 9 for s in splits for name in ('ant', 'bee')})
    push_run(train(data, tmp_path, '--epochs', 1), 'me/tuned')
    card = hub.repositories['me/tuned'].files()['README.md'].decode()
    assert f'Measured {measured}.' in card


def test_the_folder_of_a_run_is_one_that_timm_loads(run_folder):
    model = timm.create_model(f'local-dir:{run_folder}', pretrained=True)
    expected = load_file(run_folder / 'model_best.safetensors')
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg['label_names'][0] == 'T-shirt/top'


# repositories that are there


def test_a_second_push_is_a_new_commit_and_keeps_a_licence_that_was_added(hub, model):
    first = push_to_hub(model, 'me/my-model')
    repository = hub.repositories['me/my-model']
    repository.files()['README.md'] = repository.files()['README.md'].replace(b'---\n', b'---\nlicense: mit\n', 1)
    with torch.no_grad():
        model.fc.bias.add_(1)
    second = push_to_hub(model, 'me/my-model')
    assert first != second
    assert len(repository.branches['main']) == 3
    weights = [files['model.safetensors'] for _, _, files in repository.branches['main'][1:]]
    assert weights[0] != weights[1]
    assert ModelCard(repository.files()['README.md'].decode()).data.license == 'mit'


@pytest.mark.parametrize(
    'existing',
    ['# A dog', '---\ntags: [timm]\n---\n# Other', '---\ntags: [coretune, resnet50]\n---\n', '---\na: [\n---\n'],
    ids=['no-metadata', 'not-ours', 'other-architecture', 'broken'],
)
def test_the_card_of_another_model_is_kept_and_named(hub, model, caplog, existing):
    push_to_hub(model, 'me/my-model')
    hub.repositories['me/my-model'].files()['README.md'] = existing.encode()
    push_to_hub(model, 'me/my-model')
    assert hub.repositories['me/my-model'].files()['README.md'] == existing.encode()
    assert len(hub.repositories['me/my-model'].branches['main']) == 3
    assert 'README.md of me/my-model describes something else than a test_resnet' in caplog.text


def test_a_branch_of_its_own_leaves_the_main_one_alone(hub, model):
    for _ in range(2):
        push_to_hub(model, 'me/my-model', revision='second')
    branches = hub.repositories['me/my-model'].branches
    assert (len(branches['main']), len(branches['second'])) == (1, 3)


def test_private_makes_a_private_repository_and_never_publishes_in_a_public_one(hub, model):
    push_to_hub(model, 'me/hidden', private=True)
    push_to_hub(model, 'me/hidden', private=True)
    assert hub.repositories['me/hidden'].private
    push_to_hub(model, 'me/open')
    assert not hub.repositories['me/open'].private
    with pytest.raises(HubError, match='exists and is public, but was to be private'):
        push_to_hub(model, 'me/open', private=True)
    assert len(hub.repositories['me/open'].branches['main']) == 2


# failures

FOR_GOOD = [
    ('create', 401, 'does not know the token', 'wrong-token'),
    ('create', 403, r'may not write to me/my-model \(403\)', 'no-right-to-create'),
    ('create', 409, r'the name me/my-model is taken \(409\)', 'name-taken'),
    ('commit', 403, r'may not write to me/my-model \(403\)', 'no-right-to-write'),
    ('commit', 409, r'changed by someone else at this moment \(409\)', 'conflict'),
    ('commit', 429, r'takes no more requests from you for now \(429\)', 'rate-limit'),
    ('create', 500, r'error of its own \(500\)', 'server-error'),
    ('commit', 503, r'error of its own \(503\)', 'unavailable'),
    ('validate', 503, r'error of its own \(503\)', 'unavailable-at-once'),
    ('validate', b'<html>', 'answered with a page in place of data', 'page-of-a-proxy'),
    ('commit', 'cut', 'no connection to the Hub, or it was cut', 'cut'),
    ('upload', 403, r'may not write to me/my-model \(403\)', 'upload-refused'),
    ('validate', 400, r'refused the push \(400\)', 'card-refused'),
]


@pytest.mark.parametrize('step, fault, message, _', FOR_GOOD, ids=[case[-1] for case in FOR_GOOD])
def test_a_failure_publishes_nothing_and_says_what_happened(hub, model, step, fault, message, _):
    hub.fail(step, *[fault] * 20)
    with pytest.raises(HubError, match=message) as failed:
        push_to_hub(model, 'me/my-model')
    error = failed.value
    while error is not None:
        assert not any(secret in f'{error} {error!r}' for secret in (TOKEN, SIGNATURE))
        error = error.__cause__ or error.__context__
    assert all(len(repository.branches['main']) == 1 for repository in hub.repositories.values())
    hub.faults.clear()
    push_to_hub(model, 'me/my-model')
    assert len(hub.repositories['me/my-model'].branches['main']) == 2


PASSING = [
    *[('create', fault) for fault in (429, 500, 503, 'cut', 'lost')],
    *[('commit', fault) for fault in (429, 500, 503, 'cut', 'lost')],
    *[('create', {}), ('commit', {}), ('info', 'login')],
    *[('info', 503), ('validate', 'cut'), ('preupload', 500), ('batch', 429), ('upload', 503), ('upload', 'cut')],
]


@pytest.mark.parametrize('step, fault', PASSING, ids=[f'{step}-{fault}' for step, fault in PASSING])
def test_what_passes_by_is_tried_again_and_committed_once(hub, model, step, fault):
    hub.fail(step, fault, fault)
    push_to_hub(model, 'me/my-model')
    assert len(hub.repositories['me/my-model'].branches['main']) == 2
    assert hub.waits


ODD = [
    *[('create', answer) for answer in ({}, [], b'null', b'<html>', {'url': 3}, 'login')],
    *[('info', answer) for answer in ({}, [], {'id': 'me/my-model'}, {'siblings': 7}, 'login')],
    *[('preupload', answer) for answer in ({}, [], {'files': [{}]}, {'files': None}, 'login')],
    *[('batch', answer) for answer in ({}, [], {'objects': 3}, {'transfer': 'basic', 'objects': [{}]}, 'login')],
    *[('commit', answer) for answer in ({}, [], b'null', b'<html>', 'login')],
    *[('validate', answer) for answer in ([], b'null', 'login')],
    *[('branch', answer) for answer in (404, 'login')],
]


@pytest.mark.parametrize('step, answer', ODD, ids=[f'{step}-{answer}' for step, answer in ODD])
def test_an_answer_of_another_kind_is_an_error_of_the_push(hub, model, step, answer):
    hub.fail(step, *[answer] * 20)
    revision = 'second' if step == 'branch' else None
    if (step, answer) == ('branch', 'login'):  # the client takes no content from this answer
        hub.fail('info', 404)
    with pytest.raises(HubError, match='me/my-model|the Hub, or something on the way to it'):
        push_to_hub(model, 'me/my-model', revision=revision)
    assert sum(hub.waits) <= 15


@pytest.mark.parametrize('step', ['create', 'info', 'preupload', 'batch', 'upload', 'commit'])
def test_a_lasting_error_of_the_server_is_waited_for_as_long_as_the_docs_say(hub, model, step):
    hub.fail(step, *[503] * 100)
    with pytest.raises(HubError, match=r'\(503\), also after 4 more attempts'):
        push_to_hub(model, 'me/my-model')
    assert hub.waits == [1, 2, 4, 8]


@pytest.mark.parametrize('step', ['create', 'info', 'upload', 'commit'])
def test_a_server_that_does_not_answer_is_given_up_in_time(hub, model, step, monkeypatch):
    monkeypatch.setattr(connection, 'ANSWER_LIMIT', 0.1)
    factory = huggingface_hub.utils._http.__dict__.get('_GLOBAL_CLIENT_FACTORY')
    hub.fail(step, *['hang'] * 20)
    began = time.monotonic()
    with pytest.raises(HubError, match='no connection to the Hub, or it was cut'):
        push_to_hub(model, 'me/my-model')
    assert time.monotonic() - began < 5
    assert hub.waits == [1]
    assert huggingface_hub.utils._http.__dict__.get('_GLOBAL_CLIENT_FACTORY') is factory


def test_a_repository_that_is_always_being_created_is_given_up(hub, model):
    hub.busy = {'error': 'Cannot create repo: another conflicting operation is in progress'}
    with pytest.raises(HubError, match='another operation is in progress'):
        push_to_hub(model, 'me/my-model')
    assert hub.waits == [1, 2, 4, 8]


def test_what_is_no_name_or_cannot_be_read_is_not_tried_again(hub, model, tmp_path, monkeypatch):
    with pytest.raises(HubError, match='cannot be the name of a repository'):
        push_to_hub(model, 'no name')
    assert hub.waits == []
    path = tmp_path / 'gone.safetensors'
    path.write_bytes(b'1234')
    monkeypatch.setattr(time, 'sleep', lambda _: path.unlink())
    hub.fail('preupload', 503)
    with pytest.raises(HubError, match=r'a file of the run cannot be read .*gone\.safetensors'):
        upload({'model.safetensors': str(path)}, ModelCard('---\n---\n'), 'me/my-model', 'test_resnet')


@pytest.mark.parametrize('fault', ['odd', 'no-name', 'damaged'])
def test_whatever_happens_to_the_push_after_training_is_told_with_how_to_push_later(
    hub, run_folder, tmp_path, caplog, fault
):
    folder = copy_of(run_folder, tmp_path)
    if fault == 'odd':
        hub.fail('commit', *[{}] * 20)
    if fault == 'damaged':
        (folder / 'args.yaml').write_text('- model')
    name = 'no name' if fault == 'no-name' else 'me/run'
    with pytest.raises(SystemExit) as ended:
        push(OutputSettings(push_to_hub=name), str(folder), is_over=True)
    assert ended.value.code == 3
    message = caplog.records[-1].getMessage()
    assert message.startswith('Trained, but not pushed: ')
    assert shlex.split(message.split('Try again with:\n')[1])[-2:] == [str(folder), name]


def test_a_commit_of_someone_else_in_between_is_not_overwritten(hub, model, monkeypatch):
    push_to_hub(model, 'me/my-model')
    repository = hub.repositories['me/my-model']
    theirs = ('1' * 40, 'theirs', {'README.md': b'# Theirs'})
    monkeypatch.setattr(time, 'sleep', lambda _: repository.add_once(theirs))
    hub.fail('commit', 'cut')
    with pytest.raises(HubError, match='changed by someone else'):
        push_to_hub(model, 'me/my-model')
    assert repository.branches['main'][-1] == theirs


def test_no_token_and_a_name_of_someone_else_and_no_network(hub, model, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
        with pytest.raises(HubError, match='no connection to the Hub'):
            push_to_hub(model, 'me/my-model')
        assert hub.waits == [1, 2, 4, 8]
    with pytest.raises(HubError, match='may not write to you/my-model'):
        push_to_hub(model, 'you/my-model')
    with pytest.raises(HubError, match='does not know the token'):
        push_to_hub(model, 'me/my-model', token='hf_wrong')
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    with pytest.raises(HubError, match='there is no token for the Hub'):
        push_to_hub(model, 'me/my-model')
    assert hub.repositories == {}


def test_the_command_line_says_what_to_repeat_and_ends_with_3(hub, run_folder, capsys):
    hub.fail('create', 403)
    with pytest.raises(SystemExit) as ended:
        run_cli(['push', str(run_folder), 'me/my-model', '--private', '--revision', 'b'])
    assert ended.value.code == 3
    message = capsys.readouterr().err
    assert 'Not pushed: the token may not write' in message
    assert TOKEN not in message
    words = shlex.split(message.strip().splitlines()[-1])
    assert words[:3] == ['python', '-m', 'timm_coretune.hub']
    run_cli(words[3:])
    assert hub.repositories['me/my-model'].private
    assert len(hub.repositories['me/my-model'].branches['b']) == 2


def test_a_folder_without_a_run_is_refused(hub, tmp_path, capsys):
    with pytest.raises(
        ValueError, match='found no model_best.safetensors, args.yaml, summary.csv, segmentation.json or config.json'
    ):
        push_run(str(tmp_path), 'me/my-model')
    with pytest.raises(SystemExit) as ended:
        run_cli(['push', str(tmp_path), 'me/my-model'])
    assert ended.value.code == 2
    assert hub.requests == []
