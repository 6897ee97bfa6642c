"""Predictions and features are those of plain timm, image by image; what cannot be read is said and the rest is done"""

import json
import math

import numpy as np
import pytest
import timm
import torch
from commands import in_two_processes, run_command
from paths import ROOT
from PIL import Image
from runs import rows_of, train
from timm.data import create_transform, resolve_model_data_config

from timm_coretune.__main__ import main
from timm_coretune.prediction import Predictor

NAMES = ['ant', 'bee', 'cat']


@pytest.fixture(scope='module')
def run(tmp_path_factory, tiny_images):
    data = tiny_images((4, 4, 4), (2, 2, 2), names=NAMES, noise=60, tint=180)
    return train(data, tmp_path_factory.mktemp('run'), '--epochs', '1')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder with folders: 5 pictures of several sizes, formats and modes, one that is none, and a text."""
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'sub' / 'deep').mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for name, size in (
        ('a.png', (40, 30)),
        ('b.jpg', (64, 64)),
        ('sub/c.webp', (32, 50)),
        ('sub/deep/d.bmp', (33, 33)),
    ):
        Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    Image.fromarray(numbers.integers(0, 256, (40, 40), dtype=np.uint8)).convert('P').save(folder / 'sub' / 'e.gif')
    (folder / 'broken.png').write_bytes(b'no picture')
    (folder / 'notes.md').write_text('hello')
    return folder


READABLE = ['a.png', 'b.jpg', 'sub/c.webp', 'sub/e.gif', 'sub/deep/d.bmp']


def by_plain_timm(run, path):
    """Probabilities and features of one image by timm alone."""
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    image = transform(Image.open(path).convert('RGB'))[None]
    with torch.no_grad():
        features = model.forward_head(model.forward_features(image), pre_logits=True)
        return model(image).softmax(dim=1)[0], features[0]


@pytest.mark.parametrize('batch_size, workers', [(2, 0), (64, 1)])
def test_predictions_and_features_are_those_of_plain_timm(run, pictures, batch_size, workers):
    predictor = Predictor(run, 'cpu', batch_size=batch_size, workers=workers, topk=5)
    paths = [pictures / name for name in READABLE]
    predictions, features = predictor(paths), predictor.features(paths)
    for path, prediction, row in zip(paths, predictions, features, strict=True):
        probability, expected = by_plain_timm(run, path)
        assert prediction.indices == probability.argsort(descending=True).tolist()
        assert prediction.labels == [NAMES[i] for i in prediction.indices]
        assert prediction.label == prediction.labels[0]
        assert prediction.probabilities == pytest.approx(sorted(probability.tolist(), reverse=True), rel=1e-5)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    (opened,) = predictor(Image.open(paths[0]))
    assert opened.indices == predictions[0].indices


def test_a_table_has_a_row_for_each_image_and_the_exit_code_tells_of_unreadable_ones(run, pictures, tmp_path, capsys):
    words = ['predict', str(run), str(pictures), '-j', '0', '-b', '2', '--device', 'cpu', '--topk', '2']
    for ending in ('csv', 'json', 'parquet'):
        if ending == 'parquet':
            pytest.importorskip('pyarrow', reason='an extra')
        table, features = tmp_path / f'table.{ending}', tmp_path / f'features.{"npy" if ending == "csv" else "parquet"}'
        if ending != 'csv':
            pytest.importorskip('pyarrow', reason='an extra')
        with pytest.raises(SystemExit) as stopped:
            main([*words, '--output', str(table), '--features', str(features)])
        assert stopped.value.code == 1
        if ending == 'csv':
            rows = rows_of(table)
            matrix = np.load(features)
        elif ending == 'json':
            rows = json.loads(table.read_text())
        else:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(table).to_pylist()
            matrix = np.array(pyarrow.parquet.read_table(features).column('features').to_pylist())
        names = [str(pictures / name) for name in ('a.png', 'b.jpg', 'broken.png', *READABLE[2:])]
        assert [row['image'] for row in rows] == names
        (broken,) = (row for row in rows if row['error'])
        assert broken['image'].endswith('broken.png')
        assert 'no kind of image that PIL knows' in broken['error']
        for row, features_of_row in zip(rows, matrix, strict=True):
            if row is broken:
                assert np.isnan(features_of_row).all()
                continue
            probability, expected = by_plain_timm(run, row['image'])
            best = probability.topk(2)
            assert [row['label_1'], row['label_2']] == [NAMES[i] for i in best.indices]
            assert [float(row['probability_1']), float(row['probability_2'])] == pytest.approx(
                best.values.tolist(), 1e-5
            )
            assert features_of_row == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
    assert '1 left out, as they are no images by their endings' in capsys.readouterr().err


def test_a_list_names_images_beside_it(run, pictures, tmp_path, capsys):
    (pictures / 'list.txt').write_text('a.png\n\nsub/c.webp\n')
    try:
        main(['predict', str(run), str(pictures / 'list.txt'), '-j', '0', '--device', 'cpu', '--topk', '1'])
    finally:
        (pictures / 'list.txt').unlink()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in lines] == [str(pictures / name) for name in ('a.png', 'sub/c.webp')]


def test_several_labels_have_probabilities_of_their_own(pictures, tmp_path, tiny_images):
    data = tiny_images((4, 4, 4), (2, 2, 2), names=NAMES, noise=60, tint=180)
    folder = train(data, tmp_path, '--epochs', '1')
    args = folder / 'args.yaml'
    args.write_text(args.read_text().replace('task: classification', 'task: multilabel'))
    predictor = Predictor(folder, 'cpu')
    (prediction,) = predictor(pictures / 'a.png')
    probability, _ = by_plain_timm(folder, pictures / 'a.png')
    logits = dict(zip(range(3), probability.log().tolist(), strict=True))
    first, second = prediction.indices[:2]
    # sigmoids tell logits up to nothing, softmax up to a constant
    found = [math.log(p / (1 - p)) for p in prediction.probabilities]
    assert predictor.multi_label
    assert found[0] - found[1] == pytest.approx(logits[first] - logits[second], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    'words, message',
    [
        ('nowhere PICTURES', 'Expected the output folder of a run, an exported model or its weights'),
        ('EMPTY PICTURES', 'Expected config.json beside the weights in'),
        ('RUN nowhere', "Expected an image, a folder or a list in 'nowhere', there is nothing"),
        ('RUN EMPTY', 'Expected images (.png'),
        ('RUN PICTURES --output table.xlsx', "Expected a file that ends in .csv, .json, .parquet, got 'table.xlsx'"),
        ('RUN PICTURES --output nowhere/table.csv', "there is no 'nowhere'. Create it"),
        ('RUN PICTURES --topk 0', 'Expected batch_size and topk >= 1'),
    ],
)
def test_bad_input_is_refused_in_a_sentence(run, pictures, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    places = {'RUN': str(run), 'PICTURES': str(pictures), 'EMPTY': str(tmp_path)}
    with pytest.raises(SystemExit) as stopped:
        main(['predict', *(places.get(word, word) for word in words.split()), '--device', 'cpu'])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_table_of_one(run, pictures, tmp_path):
    tables = [tmp_path / 'one.csv', tmp_path / 'two.csv']
    words = [str(run), str(pictures), '-j', '0', '--device', 'cpu', '-b', '1', '--output']
    with pytest.raises(SystemExit):
        main(['predict', *words, str(tables[0])])
    launched = in_two_processes('-m', 'timm_coretune', 'predict', *words, str(tables[1]))
    run_command(launched, check=False, cwd=ROOT)
    assert tables[0].read_text() == tables[1].read_text()
