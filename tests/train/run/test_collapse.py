"""Runs with two classes log SAA and CAC before and after, and train as if nobody looked"""

import re

import pytest
import torch
from paths import ROOT
from runs import outcome, results_of, train
from tiny_data import write_folders

from timm_coretune.__main__ import main
from timm_coretune.train import session
from timm_coretune.train.run import collapse
from timm_coretune.train.run.collapse import crop_randomly

pytestmark = pytest.mark.usefixtures('one_thread')


def without_figures(line):
    return re.sub(r'[0-9]+[.][0-9]', '?', line)


def lines_of(messages):
    return [line for line in messages() if 'SAA' in line]


def test_the_log_has_both_measures_and_the_run_is_that_of_nobody_looking(images, tmp_path, monkeypatch, messages):
    seen = train(images, tmp_path / 'seen', '--coretune', '--epochs', 1)
    before, after = lines_of(messages)
    assert before.startswith('Features before the training, of 4 validation images: even: SAA ')
    assert after.startswith('Features after the training, of 4 validation images: even: SAA ')
    monkeypatch.setattr(session, 'watch_two_classes', lambda *_: None)
    unseen = train(images, tmp_path / 'unseen', '--coretune', '--epochs', 1)
    assert outcome(seen) == outcome(unseen)
    assert len(lines_of(messages)) == 2


def test_a_collapse_is_warned_of_with_what_to_do(images, tmp_path, monkeypatch, messages):
    measured = iter([[(90.0, 80.0), (90.0, 80.0)], [(10.0, 80.0), (90.0, 80.0)]])
    found = [[collapse.ClassAlignment(*pair) for pair in pairs] for pairs in measured]
    monkeypatch.setattr(collapse, 'measure_alignment', lambda *_: found.pop(0))
    results_of(images, tmp_path, '--method', 'scl', '--epochs', 1)
    (line,) = [line for line in messages('WARNING') if 'SAA' in line]
    assert line.startswith(
        "Images of the class 'even' are hardly told from each other any more: SAA was 90.0 % and is 10.0"
    )
    assert '--contrast-weight, --class-balance or --method bcl' in line


@pytest.mark.parametrize('flags', [['--method', 'l2-sp'], ['--coretune', '--val-split=']], ids=str)
def test_without_contrast_or_validation_nobody_looks(images, tmp_path, flags, messages):
    results_of(images, tmp_path, *flags, '--epochs', 1)
    assert lines_of(messages) == []


def test_views_are_crops_of_the_image_on_both_sides():
    rows = torch.linspace(0, 1, 32)
    ramp = torch.stack(torch.meshgrid(rows, rows, indexing='ij')).expand(200, 2, 32, 32)
    views = crop_randomly(ramp, torch.Generator().manual_seed(0))
    assert views.shape == ramp.shape
    down, across = (views[:, c].diff(dim=dim).mean(dim=(1, 2)) * 31 for c, dim in ((0, 1), (1, 2)))
    assert torch.all((down > 0.6) & (down < 1.05))  # sides of 0.71 to 1, never turned upside down
    assert torch.allclose(across.abs(), down, atol=0.15)
    assert 0.3 < (across < 0).float().mean() < 0.7
    assert views.min() >= -1e-3
    assert views.max() <= 1 + 1e-3


@pytest.mark.slow
def test_the_log_of_the_command_in_the_docs_has_the_lines_that_are_shown_there(tmp_path, monkeypatch, messages):
    text = (ROOT / 'docs' / 'methods.md').read_text().partition('## Whether images find positives')[2]
    command, *shown = re.findall(r'```\n(.*?)```', text, re.DOTALL)[:3]
    counts = {'train/ant': 12, 'train/bee': 3, 'validation/ant': 3, 'validation/bee': 3}
    write_folders(tmp_path / 'PICTURES', counts, size=32)
    monkeypatch.chdir(tmp_path)
    small = '--model test_resnet --img-size 32 --epochs 1 --warmup-epochs 0 --device cpu --workers 0'
    main([*command.removeprefix('python -m timm_coretune ').split(), *small.split()])
    logged = messages() + messages('WARNING')
    of_batch, of_features = (part.splitlines() for part in shown)
    assert [line for line in of_batch if line not in logged] == []
    for line in of_features:  # whose figures depend on the weights
        assert without_figures(line) in map(without_figures, logged)
