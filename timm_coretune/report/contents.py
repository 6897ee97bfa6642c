"""The contents of a report, from the files of a run and from what was found in its images"""

import os
from typing import Any, Dict, List, Optional

from PIL import Image

from ..evaluation.tables import read_confusion, read_records
from ..hub.card import CardFacts
from ..loss import resolve_method
from ..redaction import redact_values, strip_path
from ..run_folder import (
    BEST_WEIGHTS_NAME,
    CONFUSION_NAME,
    PER_CLASS_NAME,
    PREDICTIONS_NAME,
    START_EPOCH,
    SUMMARY_NAME,
    read_facts_of_run,
    read_notes,
)
from ..train.cli.settings import Settings
from ..version import __version__
from .classes import Confusion, show_classes, show_confusion
from .curves import draw_curves
from .examine import Findings
from .html import data_uri, embed, paragraph, section, text
from .images import show_mistakes
from .maps import show_features
from .origin import differences, show_origin, show_scores
from .page import create_page
from .plots import read_columns

_LARGEST_PICTURE = 1_500_000  # bytes of segmentation.png that are embedded as they are


def start_of(facts: CardFacts) -> str:
    return facts.base_model or (facts.start or 'random weights').replace('`', '').removeprefix('the ')


def _method_of(facts: CardFacts) -> str:
    method = resolve_method(bool(facts.recipe.get('coretune')), facts.recipe.get('method'))
    return {'core': 'Core-tuning', None: 'cross-entropy'}.get(method) or f'--method {method}'


def create_contents(folder: str, facts: CardFacts, findings: Optional[Findings], problem: str) -> str:
    columns = read_columns(os.path.join(folder, SUMMARY_NAME))
    weights = os.path.join(folder, BEST_WEIGHTS_NAME)
    notes = read_notes(weights) if os.path.isfile(weights) else {}
    best = int(notes['epoch']) if notes.get('epoch', '').isdigit() else None
    of_run = read_facts_of_run(folder)
    num_epochs = sum(epoch != START_EPOCH for epoch in columns.get('epoch', ()))
    epochs = f'{num_epochs} validated epochs' if columns else 'no epoch has ended'
    kind = 'Segmentation' if facts.segmentation is not None else 'Classification'
    subtitle = f'{kind} with <b>{text(facts.recipe.get("model"))}</b> on <b>{text(facts.dataset)}</b>, {epochs}.'
    scored = '' if best is None else paragraph(f'Scores of epoch {best}, the best one, whose weights were kept.')
    rows: Dict[str, Optional[str]] = {
        'Model': facts.recipe.get('model'),
        'Started from': start_of(facts),
        'Data': facts.dataset and f'{facts.dataset}, validated on {facts.dataset_split or "nothing"}',
        'Method': _method_of(facts),
        'Weights kept': facts.weights,
        'Seed': str(facts.recipe.get('seed')),
        'In this run': of_run.get('in this run'),
        'Versions': of_run.get('versions', 'not recorded by this run'),
    }
    settings = differences(redact_values(dict(facts.recipe), strip_path), Settings().flat())
    sections = [
        show_origin(rows, settings),
        draw_curves(columns, best),
        *_sections_of_images(folder, facts, findings, problem),
    ]
    title = os.path.basename(os.path.abspath(folder))
    foot = f'Written by timm_coretune {__version__} from the files of the run. This page loads nothing.'
    return create_page(title, subtitle, f'{scored}{show_scores(facts.metrics)}', sections, foot)


def _sections_of_images(folder: str, facts: CardFacts, findings: Optional[Findings], problem: str) -> List[str]:
    unit = 'images' if facts.segmentation is None else 'pixels'
    sections = []
    if findings is not None:
        no_before = ''
        if findings.no_before:
            no_before = f'<p class="note">No features of before the run: {text(findings.no_before)}.</p>'
        sections.append(show_features(findings.sets, findings.labels, findings.class_names, findings.source, no_before))
        sections.append(show_mistakes(findings.mistakes, findings.num_mistakes, findings.source))
    elif problem:
        missing = f'<p class="note">No mistakes, neighbours and features are shown: {text(problem)}.</p>'
        sections.append(section('images', 'Images', missing))
    picture = os.path.join(folder, PREDICTIONS_NAME)
    if facts.segmentation is not None:
        sections.append(_show_predictions(picture))
    confusion = _read_confusion(folder, findings, unit)
    records, source = _read_classes(folder, confusion)
    if confusion is not None:
        sections.append(show_confusion(confusion, unit))
    if records:
        sections.append(show_classes(records, source))
    return sections


def _read_confusion(folder: str, findings: Optional[Findings], unit: str) -> Optional[Confusion]:
    path = os.path.join(folder, CONFUSION_NAME)
    if os.path.isfile(path):
        names, counts = read_confusion(path)
        return Confusion(names, counts, f'All validated {unit} of the best epoch, from <code>{CONFUSION_NAME}</code>.')
    if findings is None:
        return None
    return Confusion(findings.class_names, findings.confusion.tolist(), findings.source)


def _read_classes(folder: str, confusion: Optional[Confusion]) -> Any:
    path = os.path.join(folder, PER_CLASS_NAME)
    if os.path.isfile(path):
        return read_records(path), f'From <code>{PER_CLASS_NAME}</code>, of the best epoch.'
    if confusion is None:
        return [], ''
    return confusion.scores(), 'From the counts above.'


def _show_predictions(path: str) -> str:
    """The picture of masks that a run of segmentation leaves, as it is or, if it is very large, as a JPEG."""
    if not os.path.isfile(path):
        return section(
            'masks', 'Masks', f'<p class="note">The run has no {PREDICTIONS_NAME}, which is drawn at its end.</p>'
        )
    if os.path.getsize(path) <= _LARGEST_PICTURE:
        with open(path, 'rb') as f:
            uri = data_uri(f.read(), 'png')
    else:
        with Image.open(path) as image:
            uri = embed(image, 2000).uri
    shown = f'<img class="picture" src="{uri}" alt="images, true masks and predicted masks">'
    return section('masks', 'Masks', paragraph('The first validation images, by the best weights.'), shown)
