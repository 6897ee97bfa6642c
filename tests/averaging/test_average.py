"""timm-coretune average: what it writes is plain timm's, and its figures are those of the runs"""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import segmentation_runs
import timm
import torch
from paths import ROOT
from PIL import Image
from runs import rows_of, train
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from timm_coretune import export_model
from timm_coretune.__main__ import main
from timm_coretune.averaging.start import load_start
from timm_coretune.segmentation import load_segmentation_model
from timm_coretune.train.cli.arguments import parse_args

NAMES = ['ant', 'bee', 'cat']
# images that no augmentation changes, in two batches of 12
PLAIN = ('--no-aug', '-b', '12')


@pytest.fixture(scope='module')
def images(tiny_images):
    return tiny_images((8, 8, 8), (4, 4, 4), names=NAMES, noise=120, tint=100)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """Path of weights to start from. Their statistics of BatchNorm are not those of a fresh model."""
    torch.manual_seed(5)
    model = timm.create_model('test_resnet', num_classes=0).train()
    model(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp('pretrained') / 'start.pth'
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def probed(images, pretrained, tmp_path_factory):
    """A run whose first epoch trains the head alone."""
    flags = ('--pretrained-path', pretrained, *PLAIN, '--freeze-epochs', '1', '--save-epochs', '1')
    return train(images, tmp_path_factory.mktemp('probed'), *flags)


def average(*words):
    main(['average', *map(str, words)])
    return words[words.index('--output') + 1]


def logits_of(folder, images):
    with torch.no_grad():
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)


@pytest.mark.parametrize('alpha', [0, 0.3, 1])
def test_weights_lie_between_the_start_and_the_run(probed, pretrained, tmp_path, alpha):
    output = average(probed, '--output', tmp_path / 'out', '--alpha', alpha, '--update-bn', 0)
    tuned, start = load_file(probed / 'model_best.safetensors'), torch.load(pretrained)
    found = load_file(output / 'model.safetensors')
    assert found.keys() == tuned.keys()
    for name, tensor in found.items():
        if name.startswith('fc.') or alpha == 1:
            assert torch.equal(tensor, tuned[name]), name
        elif alpha == 0:
            assert torch.equal(tensor, start[name]), name
        elif tensor.is_floating_point():
            expected = alpha * tuned[name].double() + (1 - alpha) * start[name].double()
            np.testing.assert_allclose(tensor.numpy(), expected.numpy(), rtol=1e-6, atol=1e-7)
    if alpha == 1:
        (row,) = rows_of(output / 'average.csv')
        with safe_open(probed / 'model_best.safetensors', framework='pt') as f:
            best = rows_of(probed / 'summary.csv')[int(f.metadata()['epoch'])]
        assert {name: row[name] for name in ('top1', 'top5', 'loss')} == {
            name: best[f'eval_{name}'] for name in ('top1', 'top5', 'loss')
        }


@pytest.mark.slow
def test_the_best_alpha_is_taken_and_its_figures_are_those_of_plain_timm(probed, images, tmp_path, launch):
    output = average(probed, '--output', tmp_path / 'out', '--alpha', 0, 0.4, 0.7, '--update-bn', 24)
    rows = rows_of(output / 'average.csv')
    assert [row['weights'] for row in rows] == ['alpha 0', 'alpha 0.4', 'alpha 0.7']
    assert [row['batch_norm'] for row in rows] == ['own', 'recomputed', 'recomputed']
    (taken,) = (row for row in rows if row['taken'] == '1')
    assert float(taken['top1']) == max(float(row['top1']) for row in rows)
    data = load_file(images)
    model = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    correct, batch = 0, []
    for pixels, label in zip(data['validation.image'], data['validation.label'], strict=True):
        batch.append(transform(Image.fromarray(pixels.numpy())))
        with torch.no_grad():
            correct += int(model(batch[-1][None]).argmax()) == label.item()
    assert float(taken['top1']) == pytest.approx(100 * correct / len(data['validation.label']))
    torch.save(torch.stack(batch), tmp_path / 'batch.pt')
    source = (
        f'import sys, timm, torch\nmodel = timm.create_model("local-dir:{output}", pretrained=True).eval()\n'
        'torch.save(model(torch.load("batch.pt")).detach(), "logits.pt")\nassert "timm_coretune" not in sys.modules'
    )
    launch([sys.executable, '-c', source])
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), logits_of(output, torch.stack(batch)))
    flags = ['--device', 'cpu', '-j', '0', '--img-size', '32', '--eval-output', str(tmp_path / 'results')]
    main(['evaluate', str(output), str(images), *flags])
    evaluated = json.loads((tmp_path / 'results' / 'results.json').read_text())
    assert {name: str(value) for name, value in evaluated.items()} == {name: taken[name] for name in evaluated}
    card = (output / 'README.md').read_text()
    assert f'{taken["weights"].removeprefix("alpha ")} x the tuned weights + ' in card
    assert 'alpha chosen by top1 on the validation images; the head is the tuned one' in card
    assert '| alpha 0.7 |' in card
    assert 'the figures are optimistic' in card


def test_statistics_of_batch_norm_are_those_of_the_training_images(probed, images, tmp_path):
    output = average(probed, '--output', tmp_path / 'out', '--alpha', 0.5, '--update-bn', 24)
    model = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=True, no_aug=True)
    batch = torch.stack([transform(Image.fromarray(x.numpy())) for x in load_file(images)['train.image']])
    with torch.no_grad():
        mean = model.conv1[0](batch).double().mean(dim=(0, 2, 3))
    found = load_file(output / 'model.safetensors')
    np.testing.assert_allclose(found['conv1.1.running_mean'].numpy(), mean.numpy(), rtol=1e-4, atol=1e-5)
    assert found['conv1.1.num_batches_tracked'].item() == 2


@pytest.mark.parametrize('kind', ['state', 'folder'])
def test_a_start_with_a_head_is_interpolated_whole(probed, tmp_path, kind):
    probe = probed / 'milestone-1.pth.tar'
    output = average(
        probed, '--output', tmp_path / 'out', '--alpha', 0, '--start', probe if kind == 'state' else probed
    )
    expected = tuned = load_file(probed / 'model_best.safetensors')
    if kind == 'state':
        expected = torch.load(probe, weights_only=False)['state_dict']
        assert not torch.equal(expected['fc.weight'], tuned['fc.weight'])
    found = load_file(output / 'model.safetensors')
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert 'the head is interpolated too' in (output / 'README.md').read_text()


def test_weights_of_timm_are_a_start_with_their_head_if_it_fits(images, tmp_path):
    torch.manual_seed(3)
    model = timm.create_model('test_resnet', num_classes=3)
    export_model(model, str(tmp_path))
    words = ['--data-dir', images, '--model', f'local-dir:{tmp_path}', '--pretrained']
    settings = parse_args(list(map(str, words))).settings
    for num_classes, new in ((3, set()), (5, {'fc.weight', 'fc.bias'})):
        start = load_start(settings, num_classes)
        assert start.new == new
        assert start.state.keys() == model.state_dict().keys() - new
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in start.state.items())


def test_a_soup_of_vits_is_their_mean(images, tmp_path):
    runs = []
    for seed in ('1', '2'):
        flags = ('--model', 'test_vit', '--epochs', '1', '--seed', seed)
        runs.append(train(images, tmp_path / seed, *flags))
    output = average(*runs, '--output', tmp_path / 'soup')
    tuned = [load_file(run / 'model_best.safetensors') for run in runs]
    for name, tensor in load_file(output / 'model.safetensors').items():
        expected = (tuned[0][name].double() + tuned[1][name].double()) / 2
        np.testing.assert_allclose(tensor.numpy(), expected.numpy(), rtol=1e-6, atol=1e-7)
    rows = rows_of(output / 'average.csv')
    assert [row['weights'] for row in rows] == ['1/run', '2/run', 'uniform soup']
    assert [row['taken'] for row in rows] == ['0', '0', '1']
    assert [row['batch_norm'] for row in rows] == ['own'] * 3
    for row, run in zip(rows, runs, strict=False):
        assert row['loss'] == rows_of(run / 'summary.csv')[0]['eval_loss']
    with pytest.raises(SystemExit):  # they started from random weights
        average(runs[0], '--output', tmp_path / 'wise')


def test_the_commands_of_the_docs_run(probed, tmp_path, monkeypatch, messages):
    monkeypatch.chdir(tmp_path)
    for name in ('RUN', 'RUN1', 'RUN2', 'RUN3'):
        (tmp_path / 'output' / 'train' / name).mkdir(parents=True)
        for path in probed.iterdir():
            (tmp_path / 'output' / 'train' / name / path.name).write_bytes(path.read_bytes())
    args = tmp_path / 'output' / 'train' / 'RUN3' / 'args.yaml'
    args.write_text(args.read_text().replace('val_split: validation', 'val_split: train'))
    (block,) = re.findall(r'```bash\n(.*?)```', (ROOT / 'docs' / 'averaging.md').read_text(), re.DOTALL)
    for line in block.splitlines():
        main(shlex.split(line)[1:])
    assert 'output/train/RUN3 was not validated on the images of output/train/RUN1: val_split differ' in str(
        messages('WARNING')
    )
    assert '--start output/train/RUN/milestone-1.pth.tar interpolates from it.' in str(messages())
    rows = rows_of('averaged/average.csv')
    assert [row['weights'] for row in rows] == [f'alpha {n / 10:g}' for n in range(11)]
    assert [row['batch_norm'] for row in rows] == ['own', *['recomputed'] * 9, 'own']
    # the mean of equal weights is these weights, but for the statistics of BatchNorm
    rows, found = rows_of('soup/average.csv'), load_file('soup/model.safetensors')
    assert len({row['loss'] for row in rows[:3]}) == 1
    for name, tensor in load_file(probed / 'model_best.safetensors').items():
        assert torch.equal(tensor, found[name]) or 'running' in name or 'tracked' in name


@pytest.mark.slow
def test_of_a_segmentation_model_the_backbone_is_interpolated(pretrained, tmp_path):
    data = segmentation_runs.write_odd(tmp_path / 'data', 'voc')
    run = segmentation_runs.train(data, tmp_path, '--pretrained-path', pretrained)
    output = average(run, '--output', tmp_path / 'out', '--alpha', 0.5, '--update-bn', 0)
    tuned, start = load_file(run / 'model_best.safetensors'), torch.load(pretrained)
    found = load_file(output / 'segmentation.safetensors')
    for name, tensor in found.items():
        other = start.get(name.removeprefix('backbone.'))
        if not name.startswith('backbone.'):
            assert torch.equal(tensor, tuned[name]), name
        elif tensor.is_floating_point():
            expected = (tuned[name].double() + other.double()) / 2
            np.testing.assert_allclose(tensor.numpy(), expected.numpy(), rtol=1e-6, atol=1e-7)
    model = load_segmentation_model(output)
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    backbone = timm.create_model(f'local-dir:{output}', pretrained=True, num_classes=0).state_dict()
    assert all(torch.equal(tensor, found[f'backbone.{name}']) for name, tensor in backbone.items())
    (row,) = rows_of(output / 'average.csv')
    assert 0 <= float(row['miou']) <= 100


@pytest.mark.parametrize(
    'words, message',
    [
        ('RUN --output NEW --alpha 1.5', '--alpha: expected shares of the tuned weights from 0 to 1, got 1.5'),
        ('RUN --output NEW --greedy', '--greedy needs several runs, got 1'),
        ('RUN OTHER --output NEW --alpha 1', '--alpha needs one run, got 2'),
        ('RUN RUN --output NEW', 'expected different runs'),
        ('RUN --output RUN', 'Expected a new or empty folder to write to'),
        ('EMPTY --output NEW', 'found no args.yaml there'),
        ('RUN OTHER --output NEW', 'Expected runs of the same model, classes and preparation of images, label_names'),
        ('RUN --output NEW --update-bn -1', '--update-bn: expected 0 or a number of images, got -1'),
        ('RUN --output NEW --start nowhere.pth', 'nowhere.pth'),
    ],
)
def test_bad_input_is_refused_in_a_sentence(probed, tmp_path, capsys, words, message):
    places = {'RUN': probed, 'NEW': tmp_path / 'new', 'EMPTY': tmp_path, 'OTHER': tmp_path / 'other'}
    if 'OTHER' in words:
        places['OTHER'].mkdir()
        for name in ('args.yaml', 'model_best.safetensors'):
            (places['OTHER'] / name).write_bytes((probed / name).read_bytes())
        (places['OTHER'] / 'config.json').write_text((probed / 'config.json').read_text().replace('"bee"', '"wasp"'))
    with pytest.raises(SystemExit) as stopped:
        main(['average', *(str(places.get(word, word)) for word in words.split())])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert 'Traceback' not in printed
    assert not (tmp_path / 'new').exists()
