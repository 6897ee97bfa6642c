#!/usr/bin/env python3
"""Do averaged weights generalise better? Tunes with several seeds, then averages, and scores on a shifted test set.

    python benchmarks/averaging.py --data-root DIR --networks-root DIR --results benchmarks/results/averaging.csv

Data and networks are those of benchmarks/study.yaml (docs/data.md and docs/pretraining.md make them). Each run trains
on `train` and keeps its best epoch on `val`, as a user would. Then `timm-coretune average` is done by its own
functions: every alpha between the checkpoint and the tuned weights, each scored on `val` and on `test`, and where all
seeds have the same labels a uniform and a greedy soup of all seeds. The choice is always made on `val`. The tables
compare with the tuned weights, seed by seed; the interval is that of Student's t distribution. --tables FILE prints
them from a file.
"""

import argparse
import csv
import logging
import os
import statistics
import tempfile
from collections import ChainMap
from typing import Any, Dict, List, NamedTuple, Tuple

from studies.measure import interval_of
from studies.runner import find_versions

from timm_coretune.averaging.choosing import Chooser, greedy_soup, uniform_soup
from timm_coretune.averaging.start import load_start
from timm_coretune.averaging.validation import Validation, parse_run
from timm_coretune.averaging.weights import StoredState, average_weights
from timm_coretune.run_folder import BEST_WEIGHTS_NAME
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.session import run

_FLAGS = (
    '--device cpu --channels-last --workers 0 --batch-size 64 --opt sgd --weight-decay 1e-4 --warmup-epochs 0 '
    '--sched-on-updates --smoothing 0 --scale 0.5 1 --color-jitter 0 --crop-pct 1 --checkpoint-hist 1 '
    '--check-images none --train-split train --val-split val --method core'
)
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NUM_IMAGES = 1024  # for the statistics of BatchNorm


class Case(NamedTuple):
    """Data and a network, with the settings that benchmarks/study.yaml chose.

    Attributes:
        flags: Flags of train.py.
        soup: Whether all seeds have the same labels, so that a soup knows no more labels than a run.
    """

    flags: str
    soup: bool


CASES = {
    'emoji_concept': Case(
        '--data-dir {data}/emoji_concept.safetensors --img-size 48 --epochs 6 --lr 0.01 --contrast-weight 1 '
        '--model mobilenetv2_100 --pretrained-path {networks}/emoji_concept_mobilenetv2_simclr.safetensors',
        True,
    ),
    'letters': Case(
        '--data-dir {data}/letters.safetensors --img-size 32 --hflip 0 --epochs 12 --label-fraction 0.125 --lr 0.1 '
        '--contrast-weight 0.1 --model resnet10t --pretrained-path {networks}/letters_resnet10t_simclr.safetensors',
        False,
    ),
}


class Measured(NamedTuple):
    """Top-1 of weights on both splits."""

    val: float
    test: float


def both_scores(splits: Tuple[Validation, Validation], state: Any, mixed: bool) -> Measured:
    """Scores of weights, whose statistics of BatchNorm are computed once, on training images."""
    val = splits[0](state, NUM_IMAGES if mixed else 0)['top1']
    return Measured(val, splits[1](splits[0].model.state_dict())['top1'])


def validations(folder: str) -> Tuple[Validation, Validation]:
    weights = os.path.join(folder, BEST_WEIGHTS_NAME)
    test = parse_run(folder, ['--val-split', 'test'])
    return Validation(parse_run(folder, []), weights, True), Validation(test, weights, False)


def do_case(name: str, case: Case, seeds: int, places: Dict[str, str], output: str) -> List[Dict[str, Any]]:
    rows, folders = [], []
    for seed in range(seeds):
        words = [*_FLAGS.split(), *case.flags.format(**places).split()]
        words += ['--seed', str(seed), '--output', output, '--experiment', f'{name}-{seed}']
        run(parse_args(words), words)
        folders.append(os.path.join(output, f'{name}-{seed}'))
        splits = validations(folders[-1])
        start = load_start(parse_run(folders[-1], []).settings, splits[0].run.resolved.num_classes)
        tuned = StoredState(os.path.join(folders[-1], BEST_WEIGHTS_NAME))
        for alpha in ALPHAS:
            state = average_weights([tuned, ChainMap(start.state, tuned)], [alpha, 1 - alpha])
            scores = both_scores(splits, state, 0 < alpha < 1)
            rows.append({'data': name, 'seed': seed, 'weights': f'alpha {alpha:g}', **scores._asdict()})
            print(rows[-1], flush=True)
    if case.soup:
        states = [StoredState(os.path.join(folder, BEST_WEIGHTS_NAME)) for folder in folders]
        for kind, make in (('uniform soup', uniform_soup), ('greedy soup', greedy_soup)):
            chooser = Chooser(splits[0], NUM_IMAGES)
            what = make(chooser, states, [str(seed) for seed in range(seeds)])
            val, test = chooser.rows[chooser.best].scores['top1'], splits[1](chooser.state)['top1']
            rows.append({'data': name, 'seed': '', 'weights': kind, 'val': val, 'test': test})
            print(rows[-1], what, flush=True)
    return rows


def tables(rows: List[Dict[str, Any]]) -> str:
    """Markdown tables of the rows."""
    lines = []
    for name in dict.fromkeys(row['data'] for row in rows):
        own = [row for row in rows if row['data'] == name]
        seeds = sorted({str(row['seed']) for row in own} - {''})
        by_seed = {
            seed: {r['weights']: Measured(float(r['val']), float(r['test'])) for r in own if str(r['seed']) == seed}
            for seed in seeds
        }
        tuned = [by_seed[seed]['alpha 1'] for seed in seeds]
        arms = {f'alpha {alpha:g}': [by_seed[seed][f'alpha {alpha:g}'] for seed in seeds] for alpha in ALPHAS}
        arms['alpha chosen on val'] = [max(found.values(), key=lambda m: m.val) for found in by_seed.values()]
        lines += [
            f'`{name}`, {len(seeds)} seeds:',
            '',
            '| weights | val | test | test, minus tuned |',
            '|---|---:|---:|---:|',
        ]
        for arm, found in arms.items():
            mean, half = interval_of([a.test - b.test for a, b in zip(found, tuned, strict=True)])[:2]
            values = [statistics.mean(values) for values in zip(*found, strict=True)]
            difference = '' if arm == 'alpha 1' else f'{mean:+.2f} ± {half:.2f}'
            lines.append(f'| {arm} | {values[0]:.2f} | {values[1]:.2f} | {difference} |')
        for row in own:
            if str(row['seed']) == '':
                difference = float(row['test']) - statistics.mean(m.test for m in tuned)
                lines.append(
                    f'| {row["weights"]} | {float(row["val"]):.2f} | {float(row["test"]):.2f} | {difference:+.2f} |'
                )
        lines.append('')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data-root', default='data', metavar='DIR')
    add('--networks-root', default='networks', metavar='DIR')
    add('--only', nargs='+', choices=tuple(CASES), default=tuple(CASES), help='data sets (default: all)')
    add('--seeds', type=int, default=5)
    add('--results', metavar='FILE', help='CSV file to add the rows to')
    add('--tables', metavar='FILE', help='print the tables of a CSV file, and stop')
    args = parser.parse_args()
    if args.tables:
        with open(args.tables, newline='') as f:
            print(tables(list(csv.DictReader(f))))
        return
    logging.disable(logging.INFO)
    places = {'data': args.data_root, 'networks': args.networks_root}
    versions, rows = find_versions(), []
    with tempfile.TemporaryDirectory() as output:
        for name in args.only:
            found = do_case(name, CASES[name], args.seeds, places, output)
            rows += found
            if args.results:
                is_new = not os.path.exists(args.results)
                with open(args.results, 'a', newline='') as f:
                    writer = csv.DictWriter(f, [*found[0], *versions])
                    if is_new:
                        writer.writeheader()
                    writer.writerows({**row, **versions} for row in found)
    print(tables(rows))


if __name__ == '__main__':
    main()
