"""Writes averaged weights as a folder that plain timm loads, with a table of what was tried and a model card"""

import csv
import dataclasses
import functools
import os
import shutil
import uuid
from typing import Any, Dict, List, Mapping, Sequence

import torch

from ..atomic import publish, write_text, write_whole
from ..evaluation.scores import SCORES
from ..export import export_backbone, save_weights, write_json
from ..hub.card import create_card
from ..hub.push import read_facts
from ..hub.upload import CARD_NAME
from ..model_config import PREPROCESSING
from ..redaction import redact
from ..run_folder import (
    ARGS_NAME,
    AVERAGE_NAME,
    CONFIG_NAME,
    SEGMENTATION_CONFIG_NAME,
    SEGMENTATION_WEIGHTS_NAME,
    WEIGHTS_NAME,
    read_json,
)
from .choosing import Row

OPTIMISTIC = (
    'The epochs of runs, alpha and the members of a greedy soup are chosen on the validation images that these figures '
    'are measured on, so the figures are optimistic. Measure the model on other images before you rely on them.'
)
_MODEL = ('architecture', 'model_args')


def read_config(folder: str) -> Dict[str, Any]:
    """The description of the model of a run, of a classifier or of a segmentation model.

    Raises:
        ValueError: There is none.
    """
    for name in (SEGMENTATION_CONFIG_NAME, CONFIG_NAME):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return read_json(path, 'the description of a model')
    raise ValueError(
        f'Expected {CONFIG_NAME} or {SEGMENTATION_CONFIG_NAME} in {folder!r}, found neither: it says which model the '
        'weights are of. A run of train.py writes it.'
    )


def _identity(config: Mapping[str, Any]) -> Dict[str, Any]:
    """What two models must have alike so that the mean of their weights is a model."""
    if 'backbone' in config:
        backbone = config['backbone']
        rest = {key: value for key, value in config.items() if key != 'backbone'}
        return {**{key: backbone.get(key) for key in _MODEL}, **rest}
    images = config.get('pretrained_cfg') or {}
    found = {key: config.get(key) for key in (*_MODEL, 'num_classes', 'label_names')}
    return {**found, **{key: images.get(key) for key in PREPROCESSING}}


def check_same_model(folders: Sequence[str]) -> None:
    """Raise a ValueError unless all runs are of the same architecture, classes and preparation of images."""
    first = _identity(read_config(folders[0]))
    for folder in folders[1:]:
        other = _identity(read_config(folder))
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f'Expected runs of the same model, classes and preparation of images, {key} is {first.get(key)!r} '
                    f'in {folders[0]!r} and {other.get(key)!r} in {folder!r}. Average runs that start from the same '
                    'weights and differ in settings of the training only.'
                )


def check_output(output: str) -> None:
    """Raise a ValueError if there is already something in the folder to write."""
    if os.path.lexists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise ValueError(f'Expected a new or empty folder to write to, there is something in {output!r}. Name another.')


def table(rows: Sequence[Row], best: int) -> List[List[str]]:
    """The table of what was tried, with a line of titles. The weights that were taken are marked."""
    names = [name for name in SCORES if name in rows[0].scores]
    titles = ['weights', *(f'{SCORES[name].title} ({SCORES[name].unit})' for name in names), 'BatchNorm', 'taken']
    lines = [
        [
            row.name,
            *(f'{row.scores[name]:.4g}' for name in names),
            'recomputed' if row.batch_norm else '',
            'yes' if index == best else '',
        ]
        for index, row in enumerate(rows)
    ]
    return [titles, *lines]


def _write_csv(rows: Sequence[Row], best: int, path: str) -> None:
    names = [name for name in SCORES if name in rows[0].scores]
    with write_whole(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerow(['weights', *names, 'batch_norm', 'taken'])
        for index, row in enumerate(rows):
            values = [row.scores[name] for name in names]
            writer.writerow([row.name, *values, 'recomputed' if row.batch_norm else 'own', int(index == best)])


def _card(output: str, run: str, config: Mapping[str, Any], what: str, rows: Sequence[Row], best: int) -> str:
    """The card: that of the first run, with the figures of these weights, and how they came about."""
    facts = dataclasses.replace(read_facts(run), weights=what, metrics=rows[best].scores, last_metrics={})
    card = create_card(
        f'OWNER/{os.path.basename(os.path.abspath(output))}', dict(config.get('backbone', config)), facts
    )
    titles, *lines = table(rows, best)
    marks = [f'| {" | ".join(line)} |' for line in (titles, ['---'] * len(titles), *lines)]
    section = [
        '## How the weights were averaged',
        '',
        f'These weights are {what}. They are the result of `timm-coretune average`. The recipe above is that of the '
        f'run {os.path.basename(os.path.abspath(run))!r}.',
        '',
        *marks,
        '',
        OPTIMISTIC,
    ]
    return f'{card}\n' + '\n'.join(section) + '\n'


def write_average(
    output: str, run: str, state: Mapping[str, torch.Tensor], what: str, rows: Sequence[Row], best: int
) -> None:
    """Write the folder. It appears when it is complete.

    Args:
        output: Folder to write, new or empty.
        run: Folder of the run whose description and arguments the model has.
        state: The weights.
        what: What they are, in words.
        rows: All that was tried.
        best: Index of the row of the weights.
    """
    config = read_config(run)
    parent, name = os.path.split(os.path.abspath(output))
    staging = os.path.join(parent, f'.{name[:100]}.{uuid.uuid4().hex[:8]}.tmp')
    os.makedirs(staging)
    place = functools.partial(os.path.join, staging)
    try:
        if 'backbone' in config:
            write_json(config, place(SEGMENTATION_CONFIG_NAME))
            save_weights(dict(state), place(SEGMENTATION_WEIGHTS_NAME), weights='average')
            export_backbone(place(SEGMENTATION_WEIGHTS_NAME), config['backbone'], staging)
        else:
            write_json(config, place(CONFIG_NAME))
            save_weights(dict(state), place(WEIGHTS_NAME), weights='average')
        _write_csv(rows, best, place(AVERAGE_NAME))
        shutil.copyfile(os.path.join(run, ARGS_NAME), place(ARGS_NAME))
        write_text(redact(_card(output, run, config, what, rows, best)), place(CARD_NAME))
        publish(staging, output, sorted(os.listdir(staging)))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
