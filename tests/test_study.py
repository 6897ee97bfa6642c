"""Protects benchmarks/study.py: the choice of settings, resuming, intervals, tables, and packed images"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from paths import ROOT
from PIL import Image
from runs import results_of, rows_of
from studies.file import read_study, select
from studies.measure import interval_of
from studies.picture import draw
from studies.plan import Cell, Stage, make_run, tune
from studies.report import END, begin_of, render, write_tables
from studies.results import COLUMNS, Results, choice_of, num_missing
from studies.smoke import PLAN, write_study
from studies.train import DIVERGED, Forge
from study import main
from train_flags import ACTIONS

STUDIES = {'study.yaml': 'images.csv', 'study_pixels.yaml': 'pixels.csv'}
SCRIPT = ROOT / 'benchmarks' / 'study.py'


def make_cell(arm='core', lrs=(0.01, 0.1, 1.0), weights=(None,), tune_seeds=(7,), test_seeds=(0, 1, 2)):
    stages = Stage(tune_seeds, ('--val-split', 'val')), Stage(test_seeds, ('--val-split', 'test'))
    return Cell('d', 'n', 'all', arm, ('--arm', arm), lrs, weights, '--weight', *stages)


def tuned(cell, table):
    """The choice, and the runs that were asked for as (lr, weight, seed)."""
    asked = []

    def score(run):
        setting = tuple(run.key[name] for name in ('lr', 'weight', 'seed'))
        asked.append(setting)
        return table(*setting)

    return tune(cell, score), asked


# Choice of the setting


def test_rate_and_weight_of_the_best_mean_over_seeds_are_chosen():
    scores = {  # the best single run, 90, has not the best mean
        ('0.01', '1'): (50, 52), ('0.01', '2'): (60, 60), ('0.1', '1'): (90, 10), ('0.1', '2'): (64, 70),
        ('1', '1'): (66, 66), ('1', '2'): (1, 2),
    }  # fmt: skip
    cell = make_cell(weights=(1.0, 2.0), tune_seeds=(3, 4))
    choice, asked = tuned(cell, lambda lr, weight, seed: scores[lr, weight][int(seed) - 3])
    assert choice == (0.1, 2.0, (0.01, 0.1, 1.0), True)
    assert sorted(asked) == sorted((*setting, seed) for setting in scores for seed in '34')


def test_grid_grows_beyond_a_best_rate_at_its_upper_end():
    choice, asked = tuned(make_cell(), lambda lr, *_: -abs(float(lr) - 20))  # the best of all: 10
    assert choice == (10, None, (0.01, 0.1, 1, 10, 100), True)
    assert len(asked) == 5


def test_grid_grows_at_most_twice_and_then_the_choice_is_not_inside():
    choice, _ = tuned(make_cell(lrs=(0.003, 0.01, 0.03)), lambda lr, *_: -float(lr))
    assert choice == (0.00027, None, (0.00027, 0.0009, 0.003, 0.01, 0.03), False)


def test_of_equal_scores_the_lowest_rate_wins():
    assert tuned(make_cell(), lambda lr, *_: {'0.01': 1}.get(lr, 2))[0].lr == 0.1


def test_a_setting_that_diverges_is_not_chosen():
    choice, _ = tuned(make_cell(), lambda lr, *_: float('-inf') if float(lr) > 0.1 else float(lr))
    assert choice[0::3] == (0.1, True)


def test_key_tells_runs_with_other_flags_apart():
    cell = make_cell()
    run, other = (make_run(c, 'test', 0.1, None, 0) for c in (cell, cell._replace(flags=('--arm', 'core', '--more'))))
    assert {k for k in run.key if run.key[k] != other.key[k]} == {'flags'}
    assert make_run(cell, 'tune', 0.1, None, 0).flags[-1] == 'val'
    assert run.flags == ('--arm', 'core', '--lr', '0.1', '--seed', '0', '--val-split', 'test')


# Files of studies


@pytest.mark.slow
@pytest.mark.parametrize('name', STUDIES)
def test_train_takes_the_flags_of_every_arm_of_our_studies(name, tmp_path):
    study = read_study(str(ROOT / 'benchmarks' / name))
    places = dict.fromkeys(('data', 'networks', 'assets'), str(ROOT / 'timm_coretune' / 'assets'))
    cells = [cell for cell in study.cells if '--method' not in cell.flags or '--method' in ACTIONS]
    lines = [make_run(cell, 'test', lr, cell.weights[-1], 0).words(places) for cell in cells for lr in cell.lrs[:1]]
    assert lines
    assert set(Forge(1, str(tmp_path)).check(lines)) == {''}


def test_check_finds_a_flag_that_train_does_not_have(tmp_path):
    errors = Forge(1, str(tmp_path)).check([['--lr', '0.1'], ['--lrr', '0.1'], ['--lr', '0', '--epochs', 'x']])
    assert errors[0] == ''
    assert '--lrr' in errors[1]
    assert 'epochs' in errors[2]


@pytest.mark.parametrize(
    'change, message',
    [
        ({'kind': 'videos'}, 'images or pixels'),
        ({'baseline': 'nothing'}, 'baseline among the arms'),
        ({'lrs': [0.1, 0.2]}, 'three learning rates'),
        ({'arms': {'plain': {'flgs': ''}}}, 'arm plain, got flgs'),
        ({'arms': {'plain': {'weight': [1]}}}, 'weight as {flag'),
        ({'networks': {}}, "got 'random'"),
    ],
)
def test_file_with_a_mistake_is_refused(tmp_path, change, message):
    path = tmp_path / 'study.yaml'
    path.write_text(yaml.safe_dump({**PLAN, **change}))
    with pytest.raises(ValueError, match=message):
        read_study(str(path))


def test_only_selects_cells():
    cells = [make_cell(arm)._replace(data=data) for data in 'ab' for arm in ('x', 'y', 'z')]
    assert [c.data + c.arm for c in select(cells, ['data=b,arm=x', 'arm=z'])] == ['bx', 'bz']
    assert select(cells, []) == cells
    for word in ('arm=w', 'seed=1'):
        with pytest.raises(ValueError, match=f'got {word!r}'):
            select(cells, [word])


# Results and their tables


def row_of(cell, stage, lr, weight, seed, outcome='done', **scores):
    known = {'epochs': '3', 'cpu_seconds': '1800', 'threads': '1', 'machine': 'm', 'torch': '2', 'timm': '1'}
    key = make_run(cell, stage, lr, weight, seed).key
    return {**known, **key, 'outcome': outcome, 'commit': 'abc', **{k: str(v) for k, v in scores.items()}}


def write_tuning(results, cell, best_lr, weight=None):
    for lr in cell.lrs:
        for other in cell.weights:
            top1 = 50 if (lr, other) == (best_lr, weight) else 40
            results.append(row_of(cell, 'tune', lr, other, 7, top1=top1, class_mean=0))


@pytest.fixture
def written(tmp_path):
    """A study of three arms: two are over, one diverged in a seed. Another line is of other flags."""
    cells = [make_cell('ce'), make_cell('core', weights=(0.1, 1.0)), make_cell('scl'), make_cell('late')]
    results = Results(str(tmp_path / 'results.csv'))
    for cell, weight in zip(cells[:3], (None, 1.0, None), strict=True):
        write_tuning(results, cell, 0.1, weight)
    for seed, (plain, ours) in enumerate([(70, 72), (71, 72), (72, 75)]):
        results.append(row_of(cells[0], 'test', 0.1, None, seed, top1=plain, class_mean=plain - 10))
        results.append(row_of(cells[1], 'test', 0.1, 1.0, seed, top1=ours, class_mean=plain - 10.5))
        if seed < 2:
            results.append(row_of(cells[2], 'test', 0.1, None, seed, top1=plain + seed, class_mean=60))
    results.append(row_of(cells[2], 'test', 0.1, None, 2, outcome=DIVERGED))
    results.append(row_of(cells[0]._replace(flags=('--old',)), 'test', 0.1, None, 0, top1=99, class_mean=99))
    titles = {name: name.upper() for name in ('d', 'n', 'ce', 'core', 'scl', 'late')}
    return SimpleNamespace(kind='images', baseline='ce', cells=cells, titles=titles), results


def test_interval_is_that_of_students_t():
    # by hand: mean 3, deviation sqrt(2.5), t(0.975, 4) = 2.776
    assert interval_of([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776 * (2.5 / 5) ** 0.5), rel=1e-3)
    # t(0.975, 1) = 12.706
    assert interval_of([0, 1]) == pytest.approx((0.5, 12.706 * 0.5), rel=1e-3)
    assert not interval_of([0, 1]).excludes_zero
    assert str(interval_of([2.0])) == '+2.00'


def test_table_has_means_paired_differences_and_what_was_chosen(written):
    study, results = written
    lines = render(study, study.cells, results).splitlines()
    # core minus ce: 2, 1, 3, mean 2, deviation 1, t(0.975, 2) = 4.303; the class mean is 0.5 lower in each seed
    assert lines[0] == '### D; N'
    assert lines[4:8] == [
        '| CE | 0.1 (0.01, 0.1, 1) |  | 70.0, 71.0, 72.0 | 71.00 |  | 61.00 |  |',
        '| CORE | 0.1 (0.01, 0.1, 1) | 1 (0.1, 1) | 72.0, 72.0, 75.0 | 73.00 | +2.00 ± 2.48 | 60.50 '
        '| **-0.50 ± 0.00** |',
        '| SCL | 0.1 (0.01, 0.1, 1) |  | 70.0, 72.0, diverged | 71.00 | +0.50 ± 6.35 | 60.00 | -0.50 ± 6.35 |',
        '| LATE | not tuned yet |',
    ]
    assert re.search(r'21 runs, 10\.5 hours .* timm_coretune abc\.\n1 line', '\n'.join(lines))


def test_means_over_tables_are_of_the_arms_that_all_tables_have(written):
    study, results = written
    other = [cell._replace(labels='few') for cell in study.cells[:2]]
    for cell, top1s in zip(other, ((40, 50, 60), (46, 56, 66)), strict=True):
        for lr, top1 in ((0.01, 0), (0.1, 9), (1, 0)):
            for weight in cell.weights:
                results.append(row_of(cell, 'tune', lr, weight, 7, top1=top1 + (weight or 0), class_mean=0))
        for seed, top1 in enumerate(top1s):
            weight = None if cell.weights[0] is None else 1
            results.append(row_of(cell, 'test', 0.1, weight, seed, top1=top1, class_mean=top1))
    text = render(study, [*study.cells, *other], results)
    assert text.partition('### Mean over the 2 tables')[2].splitlines()[2:6] == [
        '| arm | top-1, minus CE | class mean, minus CE |',
        '|---|---|---|',
        '| CORE | +4.00 | +2.75 |',  # 2 and 6, -0.5 and 6; SCL is in one table
        '',
    ]


def test_picture_has_the_arms_that_were_tested(written, tmp_path):
    study, results = written
    draw(study, study.cells, results, str(tmp_path / 'picture.svg'))
    texts = re.findall('<!-- (.*) -->', (tmp_path / 'picture.svg').read_text())  # matplotlib draws letters as paths
    assert [text for text in texts if text in ('CE', 'CORE', 'SCL', 'LATE', 'D; N')] == ['CORE', 'SCL', 'D; N']
    assert 'top-1 minus CE, paired, 95 % interval' in texts


def test_best_rate_at_the_end_of_all_rates_is_marked(written):
    study, results = written
    late = study.cells[3]
    for lr, top1 in ((0.01, 1), (0.1, 2), (1, 3), (10, 4), (100, 5)):
        results.append(row_of(late, 'tune', lr, None, 7, top1=top1, class_mean=0))
    assert '| LATE | not tested yet |' in render(study, study.cells, results)
    results.append(row_of(late, 'test', 100, None, 0, top1=50, class_mean=50))
    assert '| LATE | 100* (0.01, 0.1, 1, 10, 100) |' in render(study, study.cells, results)


def test_run_of_the_tuning_that_diverged_is_the_worst(written):
    study, results = written
    late = study.cells[3]
    results.append(row_of(late, 'tune', 0.01, None, 7, outcome=DIVERGED))
    for lr, top1 in ((0.1, -1), (1, -2)):
        results.append(row_of(late, 'tune', lr, None, 7, top1=top1, class_mean=0))
    assert choice_of(late, 'images', results.by_key()).lr == 0.1


def test_lines_of_other_flags_are_counted_where_there_are_no_others(written):
    study, results = written
    others = [cell._replace(flags=('--new',)) for cell in study.cells]
    assert render(study, others, results).endswith('22 line(s) of the results are of other flags or settings.')


def test_missing_runs_are_counted(written):
    study, results = written
    assert [num_missing(cell, 'images', results) for cell in study.cells] == [0, 0, 0, 6]


def test_tables_go_between_their_markers(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(f'a\n{begin_of("x/s.yaml")}\nold\n{END}\nb\n{begin_of("t.yaml")}\nother\n{END}\n')
    write_tables('new', 's.yaml', str(page))
    assert page.read_text() == (
        f'a\n{begin_of("s.yaml")}\n\nnew\n\n{END}\nb\n{begin_of("t.yaml")}\nother\n{END}\n'
    )  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(begin_of('u.yaml'))):
        write_tables('new', 'u.yaml', str(page))


def test_line_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / 'results.csv'
    results = Results(str(path))
    rows = [row_of(make_cell(), 'test', 0.1, None, seed, top1=50.5) for seed in (0, 1)]
    results.append(rows[0])
    whole = path.read_text()
    with open(path, 'a') as f:
        f.write('d,n,all,co')
    assert len(Results(str(path)).rows()) == 1
    Results(str(path)).append(rows[1])
    assert path.read_text().startswith(whole)
    assert [{k: v for k, v in row.items() if v} for row in rows_of(path)] == [
        {k: v for k, v in row.items() if v} for row in rows
    ]


def test_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / 'results.csv'
    path.write_text(','.join(COLUMNS[:-1]) + '\n')
    with pytest.raises(ValueError, match='Move the file away'):
        Results(str(path))


@pytest.mark.parametrize('name', STUDIES)
def test_tables_of_the_docs_are_those_of_the_results(name):
    study = read_study(str(ROOT / 'benchmarks' / name))
    results = Results(str(ROOT / 'benchmarks' / 'results' / STUDIES[name]))
    page = (ROOT / 'docs' / 'study.md').read_text()
    assert page.partition(f'{begin_of(name)}\n\n')[2].partition(f'\n\n{END}')[0] == render(study, study.cells, results)


# The whole


@pytest.mark.slow
def test_smoke():
    finished = subprocess.run([sys.executable, SCRIPT, '--smoke'], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert '### pictures; random' in finished.stdout
    assert '\n0 runs done, 0 failed' in finished.stdout


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_study_that_is_killed_continues_where_it_was(tmp_path, request):
    words = [*write_study(str(tmp_path)), '--only', 'arm=plain']
    path = tmp_path / 'results.csv'
    # the path of a socket in it may have about 100 characters, and tmp_path is long in a process of xdist
    temporary = Path(tempfile.mkdtemp(prefix='t'))
    request.addfinalizer(lambda: shutil.rmtree(temporary, ignore_errors=True))
    process = subprocess.Popen([sys.executable, SCRIPT, *words], env={**os.environ, 'TMPDIR': str(temporary)})
    wait_for(lambda: path.exists() and len(rows_of(path)) >= 2 and any(temporary.glob('study-*/run')))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not psutil.wait_procs(children, timeout=1)[1])
    assert not list(temporary.glob('study-*'))
    before = path.read_bytes()

    assert main(words) == 0
    assert path.read_bytes().startswith(before)
    rows = rows_of(path)
    assert [(row['stage'], row['seed']) for row in rows][-2:] == [('test', '0'), ('test', '1')]
    assert len({tuple(row[name] for name in COLUMNS[:9]) for row in rows}) == len(rows)

    # the last run by itself, and its class mean by hand
    flags = make_run(read_study(words[0]).cells[0], 'test', float(rows[-1]['lr']), None, 1).flags
    at = flags.index('--data-dir')
    more = ('--metrics', 'confusion', '--val-interval', '9')  # else the matrix is that of the best epoch
    alone = results_of(tmp_path / 'pictures', tmp_path, *flags[:at], *flags[at + 2 :], *more, base=())
    assert float(rows[-1]['top1']) == pytest.approx(alone[-1]['validation']['top1'], abs=1e-4)
    matrix = [[int(v) for k, v in row.items() if ' / ' not in k] for row in rows_of(tmp_path / 'run' / 'confusion.csv')]
    recalls = [100 * row[index] / sum(row) for index, row in enumerate(matrix)]
    assert float(rows[-1]['class_mean']) == pytest.approx(sum(recalls) / len(recalls), abs=1e-4)


@pytest.mark.slow
def test_failed_run_is_noted_and_diverged_one_is_a_result(tmp_path, capsys):
    words = write_study(str(tmp_path))
    plan = yaml.safe_load((tmp_path / 'study.yaml').read_text())
    plan['arms'] = {
        'plain': {'flags': '--data-dir {data}/nowhere'},
        'wild': {},
        'refused': {'flags': '--no-such-flag'},
    }
    plan['lrs'] = [1e30, 1e31, 1e32]
    plan['test']['seeds'] = [0]
    (tmp_path / 'study.yaml').write_text(yaml.safe_dump(plan))
    assert main(words) == 1
    noted = (tmp_path / 'results.csv.failures.txt').read_text()
    assert 'all plain, tuning: exit code 1' in noted
    assert 'nowhere' in noted
    assert 'all refused is left out' in noted
    assert 'nowhere' in capsys.readouterr().err
    rows = rows_of(tmp_path / 'results.csv')
    assert {row['arm'] for row in rows} == {'wild'}
    assert {row['outcome'] for row in rows} == {DIVERGED}
    assert len(list((tmp_path / 'results.csv.logs').iterdir())) == 1


# Packed images


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_packed_images_are_those_of_the_folder(tmp_path, mode):
    from pack_images import pack

    from timm_coretune.data.images import LabelledImages
    from timm_coretune.data.safetensors_reader import ReaderSafetensors
    from timm_coretune.train.data.class_folders import ReaderClassFolders

    draws = np.random.default_rng(0)
    for split, count in (('train', 3), ('test', 2)):
        for name in ('b10', 'b9', 'a'):
            folder = tmp_path / 'set' / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (6, 8, 3) if mode == 'RGB' else (6, 8), np.uint8)
                Image.fromarray(pixels).save(folder / f'{number}.png')
    path = pack(str(tmp_path / 'set'))
    for split in ('train', 'test'):
        folder = str(tmp_path / 'set' / split)
        readers = ReaderClassFolders(folder), ReaderSafetensors(path, split)
        assert readers[0].class_to_idx == readers[1].class_to_idx
        expected, packed = (LabelledImages(folder, reader, input_img_mode=mode) for reader in readers)
        assert len(expected) == len(packed)
        for index in range(len(packed)):
            assert expected[index][1] == packed[index][1]
            assert np.array_equal(np.asarray(expected[index][0]), np.asarray(packed[index][0]))
    assert packed.reader.image.ndim == (4 if mode == 'RGB' else 3)  # grey images stay grey
    Image.new(mode, (9, 6)).save(tmp_path / 'set' / 'train' / 'a' / '9.png')
    with pytest.raises(ValueError, match='of one size'):
        pack(str(tmp_path / 'set'))
