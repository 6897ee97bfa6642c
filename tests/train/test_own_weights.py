"""Weights of a run bring their preprocessing: its figures are those of its folder, of its weights and of plain timm"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
from PIL import Image
from runs import results_of, train
from safetensors.torch import save_file

from timm_coretune import load_checkpoint
from timm_coretune.train.cli.arguments import parse_args

ALONE = ('--device', 'cpu', '--workers', '0')
IMAGES = (  # what is no default of the model
    *('--img-size', '24', '--mean', '0.3', '0.4', '0.2', '--std', '0.1', '0.3', '0.2', '--crop-pct', '0.6'),
    *('--interpolation', 'bilinear'),
)
PLAIN_LOOP = """
import sys
import timm, torch, torchvision
{line}
data = torchvision.datasets.ImageFolder(sys.argv[1], transform)
with torch.inference_mode():
    output = torch.cat([model(image[None]) for image, _ in data]).double()
target = torch.tensor(data.targets)
loss = torch.nn.functional.cross_entropy(output, target).item()
assert 'timm_coretune' not in sys.modules
print(100 * (output.argmax(1) == target).double().mean().item(), loss)
"""


def write_pictures(root, counts, size=40):
    """Folders of noisy pictures whose middle has a brighter colour channel for each class; returns the root."""
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for index, name in enumerate(('ant', 'bee', 'cat')):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 200, (size, size + 8, 3))
                pixels[8:-8, 8:-8, index] += 30
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f'{number}.png')
    return root


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp('pictures'), {'train': 6, 'validation': 12})


@pytest.fixture(scope='module')
def tuned(pictures, tmp_path_factory):
    """The folder of a run with its own preprocessing, its validation metrics, and what it logged."""
    output = tmp_path_factory.mktemp('tuned')
    flags = ('--coretune', '--model', 'test_resnet', '--gp', 'max', '-b', '6', '--epochs', '1', '--lr', '0.02')
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr('timm_coretune.train.run.finish._logger.info', lines.append)
        (result,) = results_of(pictures, output, *IMAGES, *flags, '--warmup-epochs', '0', base=ALONE)
    return output / 'run', result['validation'], lines


def test_the_closing_line_gives_plain_timm_the_figures_of_the_run(tuned, pictures):
    _, expected, lines = tuned
    (line,) = [line.removeprefix('Load them: ') for line in lines if line.startswith('Load them: ')]
    words = [sys.executable, '-c', PLAIN_LOOP.format(line=line), str(pictures / 'validation')]
    top1, loss = map(float, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    assert top1 == pytest.approx(expected['top1'])
    assert loss == pytest.approx(expected['loss'], rel=1e-4)


@pytest.mark.parametrize(
    'flags',
    [
        ('--initial-checkpoint', '{run}/model_best.safetensors'),
        ('--initial-checkpoint', '{run}/model_best.safetensors', '--model', 'test_resnet'),
        ('--initial-checkpoint', '{run}', '--model', 'test_resnet'),
        ('--initial-checkpoint', '{run}/last.pth.tar', '--model', 'test_resnet'),
        ('--model', '{run}'),
        ('--model', '{run}', '--initial-checkpoint', '{run}/last.pth.tar'),
        ('--model', 'local-dir:{run}', '--pretrained'),
    ],
    ids=['weights', 'weights and model', 'folder as checkpoint', 'state', 'folder', 'folder and state', 'timm'],
)
def test_validation_alone_needs_no_flag_but_the_data(flags, tuned, pictures, tmp_path):
    folder, expected, _ = tuned
    flags = [flag.format(run=folder) for flag in flags]
    (result,) = results_of(pictures, tmp_path, '--eval-only', *flags, base=ALONE)
    assert result['validation']['top1'] == expected['top1']
    assert result['validation']['loss'] == pytest.approx(expected['loss'], rel=1e-5)


def test_flags_win_over_the_file_and_the_log_says_what_is_from_where(tuned, pictures, tmp_path, messages):
    folder, expected, _ = tuned
    flags = ('--eval-only', '--model', folder, '--mean', 0.9, 0.9, 0.9, '--img-size', 32)
    (result,) = results_of(pictures, tmp_path, *flags, base=ALONE)
    assert result['validation']['loss'] != pytest.approx(expected['loss'], rel=1e-3)
    (line,) = [line for line in messages() if line.startswith('Images are prepared as ')]
    assert line == (
        f'Images are prepared as config.json of {folder}/model_best.safetensors says: std (0.1, 0.3, 0.2), '
        'interpolation bilinear, crop_pct 0.6, crop_mode center; by flags or the YAML file: input_size 32, '
        'mean [0.9, 0.9, 0.9].'
    )


def test_weights_without_a_config_are_said_to_have_none(tuned, pictures, tmp_path, messages):
    moved = tmp_path / 'moved.safetensors'
    moved.write_bytes((tuned[0] / 'model_best.safetensors').read_bytes())
    flags = ('--eval-only', '--model', 'test_resnet', '--initial-checkpoint', moved, *IMAGES, '--gp', 'max')
    (result,) = results_of(pictures, tmp_path, *flags, base=ALONE)
    assert result['validation']['top1'] == tuned[1]['top1']
    assert [line for line in messages() if line.startswith('No config.json of this model is beside the checkpoint')]


def test_the_sample_and_its_recipe_do_not_win_over_the_file(tuned):
    settings = parse_args(['--eval-only', '--model', str(tuned[0])]).settings
    assert (settings.data.img_size, settings.data.crop_pct) == (None, None)
    assert (settings.model.model, settings.model.gp, settings.model.pretrained_path) == ('test_resnet', 'max', None)


def test_a_model_built_for_a_size_is_built_as_in_the_run(pictures, tmp_path):
    flags = ('--model', 'test_vit', '--img-size', '32', '--model-kwargs', 'img_size=32', '-b', '6', '--epochs', '1')
    (result,) = results_of(pictures, tmp_path, *flags, '--warmup-epochs', '0', base=ALONE)
    (again,) = results_of(pictures, tmp_path / 'again', '--eval-only', '--model', tmp_path / 'run', base=ALONE)
    assert again['validation'] == pytest.approx(result['validation'], rel=1e-5)
    settings = parse_args(['--model', str(tmp_path / 'run'), '--img-size', '64']).settings
    assert settings.model.model_kwargs == {'img_size': 64}


def test_the_config_of_another_model_is_not_taken(tuned, tmp_path):
    (tmp_path / 'config.json').write_text((tuned[0] / 'config.json').read_text())
    weights = tmp_path / 'other.safetensors'
    other = timm.create_model('resnet18', num_classes=3)
    save_file(other.state_dict(), weights)
    report = load_checkpoint(other, weights, load_classifier=True)
    assert report.described_by == ''
    assert parse_args(['--model', 'resnet18', '--initial-checkpoint', str(weights)]).settings.model.gp is None


def test_a_self_supervised_checkpoint_does_not_read_a_config_beside_it(tuned, pictures, tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    before = dict(model.pretrained_cfg)
    load_checkpoint(model, tuned[0] / 'model_best.safetensors')
    assert {k: model.pretrained_cfg[k] for k in ('mean', 'std', 'crop_pct')} == {
        k: before[k] for k in ('mean', 'std', 'crop_pct')
    }


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--model', '{empty}'], 'found no config.json or segmentation.json'),
        (['--model', '{half}'], 'found no weights'),
        (['--model', '{run}', '--pretrained-path', 'moco.pth'], 'not with --pretrained or --pretrained-path'),
        (['--model', '{run}', '--segmentation'], 'is the run of a classifier'),
        (['--initial-checkpoint', '{broken}/model_best.safetensors'], 'Expected the description of a model'),
    ],
)
def test_a_folder_that_is_no_run_is_told(flags, message, tuned, tmp_path, capsys):
    folders = {'run': tuned[0], **{name: tmp_path / name for name in ('empty', 'half', 'broken')}}
    for name in ('empty', 'half', 'broken'):
        folders[name].mkdir()
    (tmp_path / 'half' / 'config.json').write_text((tuned[0] / 'config.json').read_text())
    (tmp_path / 'broken' / 'config.json').write_text('{')
    (tmp_path / 'broken' / 'model_best.safetensors').touch()
    with pytest.raises(SystemExit):
        parse_args([flag.format(**folders) for flag in flags])
    assert message in capsys.readouterr().err


FOREIGN = {
    'file': (
        {'model_args': {'checkpoint_path': '{secret}'}},
        "got checkpoint_path='{secret}', with which timm would load",
    ),
    'cache': ({'model_args': {'cache_dir': '{secret}'}}, "got cache_dir='{secret}', with which timm would load"),
    'config': ({'model_args': {'pretrained_cfg': {'file': '{secret}'}}}, 'got pretrained_cfg='),
    'list': ({'model_args': ['checkpoint_path']}, 'Expected arguments by name as model_args'),
    'unknown': ({'model_args': {'hidden': 1}}, 'Expected arguments of the layers of test_resnet'),
    'value': ({'model_args': {'stem_width': 10**12}}, 'Expected numbers, names and lists of these'),
    'layers': ({'model_args': {'layers': [10**12]}}, 'Expected at most 256 layers'),
}


@pytest.mark.parametrize('flags', [('--model', '{run}'), ('--initial-checkpoint', '{run}/model_best.safetensors')])
@pytest.mark.parametrize('kind', FOREIGN)
def test_a_config_of_somebody_else_builds_layers_and_loads_nothing(flags, kind, tuned, tmp_path, capsys):
    run, secret = shutil.copytree(tuned[0], tmp_path / 'run'), str(tmp_path / 'secret.pth')
    change, message = FOREIGN[kind]
    config = {**json.loads((run / 'config.json').read_text()), **change}
    (run / 'config.json').write_text(json.dumps(config).replace('{secret}', secret))
    with pytest.raises(SystemExit):
        parse_args([flag.format(run=run) for flag in flags])
    error = capsys.readouterr().err
    assert message.format(secret=secret) in error
    assert error.count('config.json') == 1
    if kind != 'unknown':  # what timm cannot build is told as a difference of the models
        with pytest.raises(ValueError, match=re.escape(message.format(secret=secret))) as refusal:
            load_checkpoint(timm.create_model('test_resnet', num_classes=3), run)
        assert str(refusal.value).count(str(run / 'config.json')) == 1


def test_a_config_that_names_a_repository_is_none_of_timm(tuned, tmp_path, capsys):
    run = shutil.copytree(tuned[0], tmp_path / 'run')
    config = {**json.loads((run / 'config.json').read_text()), 'architecture': 'hf-hub:me/model'}
    (run / 'config.json').write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        parse_args(['--model', str(run)])
    assert 'found no config.json or segmentation.json of a timm model' in capsys.readouterr().err


def test_the_config_of_a_run_says_what_plain_timm_needs(tuned):
    config = json.loads((tuned[0] / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean'], cfg['crop_pct']) == ([3, 24, 24], [0.3, 0.4, 0.2], 0.6)


def test_a_run_can_start_from_the_folder_of_another(tuned, pictures, tmp_path):
    flags = ('--model', tuned[0], '-b', '6', '--epochs', '1', '--lr', '1e-9', '--warmup-epochs', '0', '--dist-bn', '')
    train(pictures, tmp_path, *flags, base=ALONE)
    old, new = (json.loads((folder / 'config.json').read_text()) for folder in (tuned[0], tmp_path / 'run'))
    assert old['pretrained_cfg'] == new['pretrained_cfg']
    assert (new['architecture'], new['global_pool']) == ('test_resnet', 'max')
