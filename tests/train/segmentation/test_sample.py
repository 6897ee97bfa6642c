"""train.py --segmentation on the sample: what a run leaves"""

import json
import math

import numpy as np
import pytest
import runs
import torch
from paths import ROOT, SAMPLE
from PIL import Image
from segmentation_runs import FIGURES, FILES, FLAGS, SIZE, last_row, read_counts, valid_pixels
from sklearn.metrics import confusion_matrix

import timm_coretune
from timm_coretune.segmentation import predict_image
from timm_coretune.segmentation.__main__ import run as run_segmentation
from timm_coretune.segmentation.data.scenes import FashionScenes


def figures_of(pixels, predicted, loss):
    """PA, MPA, mIoU and FWIoU in percent of true and predicted classes, by scikit-learn's counts."""
    counts = confusion_matrix(pixels, predicted, labels=range(11))
    share, recall, iou = {}, {}, {}
    for c in range(11):
        union = counts[c].sum() + counts[:, c].sum() - counts[c, c]
        if union:
            iou[c] = counts[c, c] / union
        if counts[c].sum():
            share[c], recall[c] = counts[c].sum() / len(pixels), counts[c, c] / counts[c].sum()
    return {
        'loss': loss,
        'pa': 100 * counts.trace() / len(pixels),
        'mpa': 100 * sum(recall.values()) / len(recall),
        'miou': 100 * sum(iou.values()) / len(iou),
        'fwiou': 100 * sum(share[c] * iou[c] for c in share),
    }


@pytest.mark.slow
def test_the_bare_command_leaves_a_model_with_the_figures_of_scikit_learn(launch, tmp_path, read_csv):
    flags = ['--segmentation', '--coretune', '--epochs', '1', '--label-fraction', '0.1', '--experiment', 'run']
    finished = launch(['accelerate', 'launch', '--cpu', str(ROOT / 'train.py'), *flags])
    folder = tmp_path / 'output' / 'train' / 'run'
    assert {path.name for path in folder.iterdir()} - {'.lock'} == FILES
    (row,) = read_csv(folder / 'summary.csv')
    assert all(math.isfinite(float(row[f'train_{name}'])) for name in ('loss', 'task', 'contrast', 'dense'))
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith('Test: ')]
    for name, shown in zip(FIGURES, ('Loss', 'PA', 'MPA', 'mIoU', 'FWIoU'), strict=True):
        assert f'{shown}: {float(row[f"eval_{name}"]):>7.3f}' in line

    (words,) = [line for line in finished.stderr.splitlines() if line.startswith('Load them: ')]
    assert words == "Load them: timm_coretune.load_segmentation_model('./output/train/run')"
    model = timm_coretune.load_segmentation_model(folder)
    pixels, predicted, total = [], [], 0.0
    scenes = FashionScenes(SAMPLE, 'validation')
    for scene, mask in map(scenes.load, range(len(scenes))):  # as large as the images of the recipe
        image = torch.from_numpy(np.array(scene)).permute(2, 0, 1) / 255
        with torch.inference_mode():
            output = model((image[None] - 0.5) / 0.5)[0]
        counted = np.array(mask) != 255
        pixels.append(np.array(mask)[counted])
        predicted.append(output.argmax(0).numpy()[counted])
        log_p = output.double().log_softmax(0).flatten(1)[:, counted.flatten()]
        total -= log_p.gather(0, torch.from_numpy(pixels[-1]).long()[None]).sum().item()
    pixels, predicted = np.concatenate(pixels), np.concatenate(predicted)
    expected = figures_of(pixels, predicted, total / len(pixels))
    # the metric of a pixel at a tie may fall either way
    assert {name: float(row[f'eval_{name}']) for name in FIGURES} == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert len(set(predicted.tolist())) > 1


def test_the_figures_of_a_run_are_those_of_its_weights(voc, tuned, tmp_path):
    flags = ['--eval-only', '--initial-checkpoint', tuned / 'model_best.safetensors']
    (result,) = runs.results_of(voc, tmp_path, *flags, base=FLAGS)
    assert result['validation'] == pytest.approx({name: last_row(tuned)[f'eval_{name}'] for name in FIGURES}, rel=1e-6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('named', ['folder', 'weights'])
def test_validation_alone_needs_no_flag_but_the_data(named, voc, tmp_path, messages):
    images = ('--mean', 0.3, 0.4, 0.2, '--std', 0.1, 0.3, 0.2, '--interpolation', 'nearest')
    head = ('--segmentation-head', 'fcn', '--model-kwargs', 'output_stride=16', '--epochs', '1')
    (expected,) = runs.results_of(voc, tmp_path, *images, *head, base=FLAGS)
    run = tmp_path / 'run'
    flags = ['--model', run] if named == 'folder' else ['--initial-checkpoint', run / 'model_best.safetensors']
    alone = ('--eval-only', '--device', 'cpu', '--workers', '0')
    (result,) = runs.results_of(voc, tmp_path / 'again', *flags, base=alone)
    assert result['validation'] == pytest.approx(expected['validation'], rel=1e-5)
    (line,) = [line for line in messages() if line.startswith('Images are prepared as ')]
    assert line == (
        f'Images are prepared as {run}/segmentation.json says: input_size (3, {SIZE}, {SIZE}), mean (0.3, 0.4, 0.2), '
        'std (0.1, 0.3, 0.2), interpolation nearest.'
    )


def test_a_run_leaves_the_files_of_a_segmentation_and_none_of_an_image_model(voc, tuned, read_csv):
    assert {path.name for path in tuned.iterdir()} - {'.lock'} == FILES
    rows = read_csv(tuned / 'per_class.csv')
    assert [row['class'] for row in rows] == (voc / 'classes.txt').read_text().splitlines()
    assert [int(row['pixels']) for row in rows] == valid_pixels(voc, 'val').tolist()
    assert read_counts(tuned).sum(1).tolist() == valid_pixels(voc, 'val').tolist()
    config = json.loads((tuned / 'segmentation.json').read_text())
    assert (config['head'], config['img_size'], config['num_classes']) == ('deeplabv3', [SIZE, SIZE], 11)
    assert config['backbone']['model_args']['output_stride'] == 8
    width, height = Image.open(tuned / 'segmentation.png').size
    assert min(width, height) > 200


def test_masks_are_predicted_from_the_folder_of_a_run(voc, tuned, tmp_path):
    run_segmentation(['predict', str(tuned), str(voc / 'JPEGImages'), '--output', str(tmp_path), '--device', 'cpu'])
    model = timm_coretune.load_segmentation_model(tuned)
    images = sorted((voc / 'JPEGImages').iterdir())
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f'{path.stem}.png' for path in images]
    for path in images:
        mask = Image.open(tmp_path / f'{path.stem}.png')
        assert mask.mode == 'P'
        assert mask.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert np.array_equal(np.array(mask), predict_image(model, Image.open(path)).numpy())
        assert mask.size == Image.open(path).size
