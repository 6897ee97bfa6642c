"""Every number on the command line has a range, which holds what timm works with"""

import dataclasses
import math

import pytest
from train_flags import PARSER, TIMM_OPTIONS

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.flags import numbers_of
from timm_coretune.train.cli.ranges import RANGES, Range
from timm_coretune.train.cli.settings import Settings

SETTINGS = Settings()
NUMBERS = numbers_of([type(getattr(SETTINGS, group.name)) for group in dataclasses.fields(SETTINGS)])
CHECKED = sorted(name for name, allowed in RANGES.items() if allowed != Range())


def refused(words, capsys):
    """What the command line is answered with, which must be one line."""
    with pytest.raises(SystemExit) as stopped:
        parse_args(['--data-dir', '.', *words])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix('train.py: error: ')


def test_every_number_has_a_range():
    by_the_parser = {a.dest for a in PARSER._actions if a.type in (int, float)}
    assert set(RANGES) == set(NUMBERS) == by_the_parser
    assert len(by_the_parser) > 100
    assert {name for name in RANGES if RANGES[name] == Range()} == {
        *('head_init_scale', 'head_init_bias', 'grad_accum_steps', 'poly_epsilon'),  # any number makes sense
        *('val_fraction', 'drop_connect', 'local_rank'),  # conflicts.py knows more
    }


def test_the_defaults_of_timm_are_in_range():
    parse_args(['--data-dir', '.'])
    for option in TIMM_OPTIONS:
        name = option.get('dest', option['flags'][-1].lstrip('-').replace('-', '_'))
        default = option.get('default')
        if name in RANGES and isinstance(default, (int, float)) and not isinstance(default, bool):
            assert RANGES[name].has(default), name


@pytest.mark.parametrize('name', CHECKED)
def test_a_number_below_its_range_is_refused_with_the_range(capsys, name):
    allowed, number = RANGES[name], NUMBERS[name]
    value = allowed.low if allowed.above else allowed.low - 1
    value = str(number.type(value))
    count = allowed.num_values or (3 if name == 'input_size' else 1)
    said = refused([f'--{name.replace("_", "-")}', *[value] * count], capsys)
    assert said == f'--{name.replace("_", "-")}: {allowed}, got {" ".join([value] * count)}'


@pytest.mark.parametrize(
    'words, message',
    [
        ('--log-interval 0', '--log-interval: 1 or more, got 0'),
        ('--epochs -3', '--epochs: 0 or more, got -3'),
        ('--checkpoint-hist 0', '--checkpoint-hist: 1 or more, got 0'),
        ('--val-interval 0', '--val-interval: 1 or more, got 0'),
        ('--lr-base-size 0', '--lr-base-size: 1 or more, got 0'),
        ('--decay-epochs 0', '--decay-epochs: above 0, got 0.0'),
        ('--hflip 1.5', '--hflip: 0 to 1, got 1.5'),
        ('--smoothing 1', '--smoothing: 0 or more, below 1, got 1.0'),
        ('--label-fraction 2', '--label-fraction: above 0, at most 1, got 2.0'),
        ('--coretune --contrast-temperature 0', '--contrast-temperature: above 0, got 0.0'),
        ('--coretune --coretune-alpha -1', '--coretune-alpha: above 0, got -1.0'),
        ('--lr nan', '--lr: 0 or more, got nan'),
        ('--lr inf', '--lr: 0 or more, got inf'),
        ('--mean nan 0 0', '--mean: -10 to 10, got nan 0.0 0.0'),
        ('--scale 0.5', '--scale: 2 values, each 0 or more, got 0.5'),
        ('--cutmix-minmax 0.5 0.6 0.7', '--cutmix-minmax: 2 values, each 0 to 1, got 0.5 0.6 0.7'),
        ('--seed -1', '--seed: 0 to 4294967295, got -1'),
    ],
)
def test_a_number_out_of_range_ends_in_one_sentence(capsys, words, message):
    assert refused(words.split(), capsys) == message


@pytest.mark.parametrize(
    'words',
    [
        '--epochs 0',
        '--grad-accum-steps 0',
        '--grad-accum-steps -2',
        '--warmup-epochs 0 --warmup-lr 0 --min-lr 0 --cooldown-epochs 0 --patience-epochs 0',
        '--lr 0 --weight-decay 0 --momentum 0 --opt-eps 0 --opt-betas 0.9 0.95 0.99',
        '--clip-grad inf',
        '--clip-grad 0 --layer-decay 1.1 --lr-cycle-limit 0 --decay-epochs 0.5 --decay-rate 1',
        '--drop 1 --drop-path 1 --model-ema-decay 1 --bn-momentum 0 --head-init-scale 0 --head-init-bias -6.9',
        '--validation-batch-size 0 --workers 0 --epoch-repeats 0.5 --crop-pct 1.2 --train-num-samples 0',
        '--scale 1 1 --ratio 0.5 2 --hflip 1 --vflip 0 --color-jitter 0 --reprob 1 --aug-repeats 0',
        '--mixup-prob 0 --cutmix-minmax 0 1 --mixup-off-epoch 0 --smoothing 0',
        '--seed 4294967295 --start-epoch 0 --recovery-interval 0 --tta 1 --patience 1',
    ],
)
def test_what_timm_works_with_is_taken(words):
    parse_args(['--data-dir', '.', *words.split()])


@pytest.mark.parametrize(
    'text, message',
    [
        ('log_interval: 0', '--log-interval: 1 or more, got 0'),
        ('scale: [0.5]', '--scale: 2 values, each 0 or more, got 0.5'),
        ('ratio: [1, 0]', '--ratio: 2 values, each above 0, got 1 0'),
        ('lr: -1', '--lr: 0 or more, got -1'),
    ],
)
def test_numbers_of_a_file_are_checked_too(tmp_path, capsys, text, message):
    (tmp_path / 'config.yaml').write_text(f'{text}\n')
    assert refused(['-c', str(tmp_path / 'config.yaml')], capsys) == message


def test_a_range_says_what_is_in_it():
    for allowed, inside, outside in (
        (Range(0, 1), (0, 0.5, 1), (-0.1, 1.1, math.nan)),
        (Range(0, 1, above=True), (0.5, 1), (0, math.inf)),
        (Range(0, 1, below=True), (0, 0.99), (1,)),
        (Range(0, may_be_infinite=True), (0, math.inf), (-math.inf, math.nan)),
    ):
        assert all(map(allowed.has, inside))
        assert not any(map(allowed.has, outside))
