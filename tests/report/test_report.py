"""The report of a run shows what plain timm and the tables of the run say, and says what is gone"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import segmentation_runs
import timm
import torch
import torch.nn.functional as F
from paths import ROOT
from PIL import Image
from report_page import HOSTILE as NAMES
from report_page import Page, number_in
from runs import copy_of, rows_of, train
from safetensors.torch import load_file, save_file
from segmentation_runs import read_counts
from timm.data import create_transform, resolve_model_data_config

from timm_coretune.__main__ import main
from timm_coretune.report.create import create_report
from timm_coretune.report.html import embed


@pytest.fixture
def copied(run, tmp_path):
    return copy_of(run, tmp_path)


@pytest.fixture(scope='module')
def page(run):
    return Page((run / 'report.html').read_text(encoding='utf-8'))


def report_of(folder, **kwargs):
    return Path(create_report(str(folder), 'cpu', **kwargs)).read_text(encoding='utf-8')


def plain(run, noise, weights=None):
    """Probabilities and features (N, D) of both splits by plain timm, and its labels and images."""
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    if weights is not None:
        missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
        assert not unexpected
        assert all('fc' in key for key in missing)
    tensors, found = load_file(noise), {}
    for split in ('train', 'validation'):
        images = [Image.fromarray(image.numpy()) for image in tensors[f'{split}.image']]
        with torch.no_grad():
            batch = torch.stack([transform(image) for image in images])
            features = model.forward_head(model.forward_features(batch), pre_logits=True)
            found[split] = images, tensors[f'{split}.label'], model(batch).softmax(dim=1), features
    return found


def test_the_page_has_every_section_and_loads_nothing(run, page):
    assert list(page.sections) == ['top', 'run', 'curves', 'features', 'mistakes', 'confusion', 'classes', 'bottom']
    for tag, attributes in page.elements:
        assert tag not in ('script', 'iframe', 'object', 'embed', 'audio', 'video', 'base', 'form')
        assert not [name for name in attributes if name.startswith('on')]
        for name in ('src', 'href', 'xlink:href'):
            assert attributes.get(name, '#').startswith(('#', 'data:')), attributes
    text = (run / 'report.html').read_text(encoding='utf-8')
    assert 'url(h' not in text
    assert '@import' not in text
    assert len(text) < 5e6


def test_hostile_names_are_text(page):
    assert NAMES[0] in page.sections['classes']
    assert page.sections['features'].count(NAMES[2]) == 1
    # what turns the direction of writing is no letter
    assert {row[0] for row in page.tables['bars'][1:]} == {*NAMES[:3], 'עברית?'}


def test_what_was_run_is_said(run, page, checkpoint, noise):
    text = page.sections['run']
    for words in ('test_resnet', 'Core-tuning', 'checkpoint start.safetensors', 'images, validated on validation'):
        assert words in text
    for words in (f'torch {torch.__version__}', f'timm {timm.__version__}', 'device cpu, 1 process(es)', 'Seed 42'):
        assert words in ' '.join(text.split())
    assert '--lr 0.05' in ' '.join(text.split())
    assert '--warmup-epochs 0' in ' '.join(text.split())
    assert '--weight-decay' not in text  # a default
    assert str(run.parent) not in (run / 'report.html').read_text()
    assert str(noise.parent) not in (run / 'report.html').read_text()
    row = rows_of(run / 'summary.csv')[-1]
    assert f'{float(row["eval_top1"]):.1f}' in page.sections['top']
    assert f'{float(row["eval_loss"]):.3f}' in page.sections['top']


def test_mistakes_and_their_neighbours_are_those_of_plain_timm(run, page, noise):
    found = plain(run, noise)
    images, labels, probability, features = found['validation']
    bank_images, bank_labels, _, bank = found['train']
    value, said = probability.max(dim=1)
    wrong = [i for i in value.argsort(descending=True).tolist() if said[i] != labels[i]]
    assert 0 < len(wrong) <= 24
    assert f'{len(wrong)} of them were classified wrongly. Shown are all' in page.sections['mistakes']
    counts = read_counts(run)
    assert len(wrong) == counts.sum() - counts.trace()
    shown = iter(page.images)
    similarity = F.normalize(features) @ F.normalize(bank).T
    for i in wrong:
        near = similarity[i].topk(5)
        assert next(shown)['src'] == embed(images[i]).uri
        for j in near.indices:
            assert next(shown)['src'] == embed(bank_images[j], 56).uri
        words = f'said {NAMES[said[i]]} {100 * value[i]:.1f}\xa0%'.replace('\u202e', '?')
        assert words in ' '.join(page.sections['mistakes'].split(' ')).replace('  ', ' ')
    assert next(shown, None) is None


def nearest_neighbour_accuracy(found):
    """In percent, by the 20 nearest with weights exp(cosine / 0.07), in loops."""
    (_, labels, _, features), (_, bank_labels, _, bank) = found['validation'], found['train']
    hits = 0
    for label, row in zip(labels.tolist(), features, strict=True):
        cosines = F.cosine_similarity(row[None].double(), bank.double())
        votes = [0.0] * 4
        for j in cosines.argsort(descending=True)[:20].tolist():
            votes[bank_labels[j]] += (cosines[j] / 0.07).exp().item()
        hits += votes.index(max(votes)) == label
    return 100 * hits / len(labels)


def test_features_are_those_of_the_start_and_of_the_best_weights(run, page, noise, checkpoint):
    head, accuracy, *_ = page.tables['figures']
    assert head[1:3] == ['before', 'after']
    expected = [nearest_neighbour_accuracy(plain(run, noise, weights)) for weights in (checkpoint, None)]
    assert [number_in(cell) for cell in accuracy[1:3]] == pytest.approx(expected, abs=0.051)
    assert 'Looked at: all 24 held-out images, and all 32 training images.' in page.sections['features']


def test_tables_are_those_of_the_run(run, page):
    by_name = {row[0]: row for row in page.tables['bars'][1:]}
    for name, record in zip([*NAMES[:3], 'עברית?'], rows_of(run / 'per_class.csv'), strict=True):
        values = [float(record[key] or 'nan') for key in ('f1', 'recall', 'precision', 'support')]
        assert [number_in(cell) for cell in by_name[name][1:]] == pytest.approx(values, abs=0.051, nan_ok=True)


def test_the_report_at_the_end_is_that_of_the_command(run, copied, capsys):
    at_the_end = (copied / 'report.html').read_bytes()
    (copied / 'report.html').unlink()
    main(['report', str(copied), '--device', 'cpu'])
    assert (copied / 'report.html').read_bytes() == at_the_end
    assert f'Report: {copied / "report.html"}' in capsys.readouterr().out


def test_without_tables_and_checkpoint_images_are_counted_and_after_is_shown(copied, tmp_path, page):
    for name in ('confusion.csv', 'per_class.csv'):
        (copied / name).unlink()
    args = copied / 'args.yaml'
    lines = args.read_text().splitlines(keepends=True)
    gone = 'pretrained_path: /private/folder/gone.safetensors\n'
    args.write_text(''.join(gone if line.startswith('pretrained_path') else line for line in lines))
    before = (copied / 'report.html').read_bytes()
    text = report_of(copied, path=str(tmp_path / 'x.html'))
    assert (copied / 'report.html').read_bytes() == before
    counted = Page(text)
    for kind in ('matrix', 'pairs', 'bars'):
        assert counted.tables[kind] == page.tables[kind]
    assert 'Looked at: all 24 held-out images' in counted.sections['confusion']
    assert '/private/folder' not in text
    assert 'No features of before the run:' in counted.sections['features']
    assert 'gone.safetensors' in counted.sections['features']
    assert counted.tables['figures'][0] == ['', 'after']
    assert [row[1] for row in counted.tables['figures'][1:]] == [row[2] for row in page.tables['figures'][1:]]


def test_images_that_are_gone_are_said_and_the_tables_are_shown(copied, page):
    args = copied / 'args.yaml'
    lines = args.read_text().splitlines(keepends=True)
    gone = 'data_dir: /private/folder/gone\n'
    args.write_text(''.join(gone if line.startswith('data_dir') else line for line in lines))
    text = report_of(copied)
    assert '/private' not in text
    without = Page(text)
    assert list(without.sections) == ['top', 'run', 'curves', 'images', 'confusion', 'classes', 'bottom']
    assert 'No mistakes, neighbours and features are shown: ' in without.sections['images']
    assert without.tables['bars'] == page.tables['bars']


def test_a_run_that_was_interrupted_has_a_report_of_what_there_is(copied):
    for path in copied.iterdir():
        if path.name not in ('args.yaml', 'config.json'):
            path.unlink()
    without = Page(report_of(copied))
    assert 'no epoch has ended' in without.sections['top']
    assert 'so there are no curves' in without.sections['curves']
    assert 'the run has no model_best.safetensors, as no epoch has ended' in without.sections['images']
    assert 'test_resnet' in without.sections['run']


@pytest.mark.parametrize(
    'words, message',
    [
        ('nowhere', 'Expected the output folder of a run of train.py in'),
        ('RUN --max-images 0', 'Expected --max-images of 1 or more, got 0'),
        ('EMPTY', 'Expected the settings of a run in'),
    ],
)
def test_what_is_no_run_is_refused(copied, tmp_path, capsys, words, message):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'args.yaml').write_text('[1, 2')
    places = {'RUN': str(copied), 'EMPTY': str(tmp_path / 'empty')}
    with pytest.raises(SystemExit) as stopped:
        main(['report', *(places.get(word, word) for word in words.split())])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_a_run_is_refused_before_it_starts(noise, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError, match=r'timm-coretune\[vis\]'):
        train(noise, tmp_path, '--report')
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_images_with_several_labels_have_curves_and_scores(tmp_path):
    labels = torch.randint(2, (16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = torch.randint(256, (2, 16, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensors = {'train.image': images[0], 'validation.image': images[1]}
    save_file({**tensors, 'train.label': labels, 'validation.label': labels.clone()}, tmp_path / 'data.safetensors')
    flags = ('--task', 'multilabel', '--metrics', 'per-class', '--epochs', '1', '--in-chans', '1')
    folder = train(tmp_path / 'data.safetensors', tmp_path, *flags)
    page = Page(report_of(folder))
    assert 'images have several labels' in page.sections['images']
    records = rows_of(folder / 'per_class.csv')
    ranked = sorted(float(record['f1']) for record in records)
    assert page.tables['bars'][0] == ['Class', 'F1', 'AP', 'Images']
    assert [number_in(row[1]) for row in page.tables['bars'][1:]] == pytest.approx(ranked, abs=0.051)


@pytest.mark.slow
def test_a_segmentation_has_its_masks_and_the_iou_of_its_classes(tmp_path):
    segmentation_runs.write_odd(tmp_path / 'data', 'voc')
    folder = segmentation_runs.train(tmp_path / 'data', tmp_path, '--coretune', '--report')
    page = Page((folder / 'report.html').read_text(encoding='utf-8'))
    assert list(page.sections) == ['top', 'run', 'curves', 'masks', 'confusion', 'classes', 'bottom']
    (picture,) = page.images
    assert picture['src'].startswith('data:image/png;base64,')
    counts = read_counts(folder)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    iou = sorted(100 * counts.diagonal()[union > 0] / union[union > 0])
    rows = page.tables['bars'][1:]
    assert [number_in(row[1]) for row in rows][: len(iou)] == pytest.approx(iou[:30], abs=0.051)
    assert 'Cross-entropy of all pixels' in page.sections['curves']


@pytest.mark.slow
def test_two_processes_write_one_report(noise, checkpoint, tmp_path, launch):
    from commands import in_two_processes
    from runs import ON_CPU

    words = ['--data-dir', noise, '--output', tmp_path, '--experiment', 'two', *ON_CPU, '--epochs', '1', '--report']
    log = launch(in_two_processes(ROOT / 'train.py', *map(str, words), '--pretrained-path', str(checkpoint)))
    page = Page((tmp_path / 'two' / 'report.html').read_text(encoding='utf-8'))
    assert '2 process(es)' in page.sections['run']
    assert log.stderr.count('Report: ') == 1


@pytest.mark.slow
def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch):
    block = re.search(r'```bash\n(.*?)```', (ROOT / 'docs' / 'report.md').read_text(), re.DOTALL)[1]
    install, training, reporting = block.splitlines()
    assert install == "pip install -e '.[vis]'"
    *module, flags = training.partition('python -m timm_coretune.train ')
    assert module == ['', 'python -m timm_coretune.train ']
    monkeypatch.chdir(tmp_path)
    # a tenth of the training images makes a quick test
    main(['train', *shlex.split(flags), '--device', 'cpu', '--label-fraction', '0.1'])
    report = tmp_path / 'output' / 'train' / 'my_run' / 'report.html'
    sentence = 'Looked at: all 1\u202f000 held-out images, and all 400 training images.'
    assert sentence in Page(report.read_text(encoding='utf-8')).sections['features']
    report.unlink()
    command, *words = shlex.split(reporting)
    assert command == 'timm-coretune'
    main(words)
    assert 'Looked at: 500 of 1\u202f000 held-out' in Page(report.read_text(encoding='utf-8')).sections['features']
