"""The last lines of a run: its best score by name, and how an interrupted run goes on"""

import json
import math
import shlex
import sys

import pytest
from runs import results_of, rows_of, stop_at

from timm_coretune.evaluation.scores import SCORES, describe_value
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.session import run


@pytest.mark.parametrize(
    'name, value, text',
    [
        ('top1', 100 / 3, 'top1 33.33 %'),
        ('miou', 7, 'miou 7.00 %'),
        ('ece', 0.1234, 'ece 0.12 %'),
        ('loss', 2.3456789, 'loss 2.346 nats'),
        ('loss', 1.23456e-7, 'loss 1.235e-07 nats'),
        ('loss', math.nan, 'loss nan nats'),
    ],
)
def test_a_score_is_told_with_its_name_and_unit(name, value, text):
    assert describe_value(name, value) == text
    assert name in SCORES


@pytest.mark.parametrize('flags, metric', [((), 'top1'), (('--val-split=',), 'loss')], ids=['scored', 'not-validated'])
def test_the_best_score_is_named(tmp_path, data, messages, capsys, flags, metric):
    results = results_of(data, tmp_path, *flags)
    scores = [(result['validation'] or result['train'])[metric] for result in results]
    best = (min if metric == 'loss' else max)(scores)
    assert f'*** Best metric: {describe_value(metric, best)} (epoch {scores.index(best)})' in messages()
    assert any(message.startswith(f'Last epoch: {describe_value(metric, scores[-1])}. ') for message in messages())
    assert len(json.loads(capsys.readouterr().out.split('--result\n')[1])) == 2  # whole figures, as timm prints them


def test_an_interrupted_run_prints_no_result_and_one_command_that_finishes_it(
    tmp_path, data, monkeypatch, messages, capsys
):
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    with monkeypatch.context() as context:
        stop_at(context, 'validate', 1)
        results_of(data, tmp_path, '--resume', 'auto')
    assert '--result' not in capsys.readouterr().out
    (said,) = [message for message in messages() if message.startswith('Interrupted. Continue with:\n')]
    launcher, _, *words = shlex.split(said.splitlines()[1])[1:]
    assert launcher == 'launch'
    flags = [word for word in words if word.startswith('-')]
    assert len(flags) == len(set(flags))
    assert words[words.index('--output') + 1] == str(tmp_path)
    run(parse_args(words), words)
    assert [row['epoch'] for row in rows_of(tmp_path / 'run' / 'summary.csv')] == ['0', '1']
