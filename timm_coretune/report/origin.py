"""What was run: settings, data, start, versions, and the best epoch with its scores"""

from typing import Any, Dict, Mapping, Optional

from ..evaluation.scores import PERCENT, SCORES
from .html import listed, number, section, text

# settings that the page has in a place of its own
_ELSEWHERE = ('model', 'data_dir', 'dataset', 'output', 'experiment', 'num_classes', 'train_split', 'val_split')


def show_scores(metrics: Mapping[str, float]) -> str:
    """Scores as large numbers, in the order of SCORES."""
    cards = []
    for key, score in SCORES.items():
        if key in metrics:
            is_percent = score.unit == PERCENT
            value = number(metrics[key], 1 if is_percent else 3)
            cards.append(f'<b>{value}<small> {score.unit}</small></b><span>{score.title}</span>')
    return listed(cards, 'scores')


def differences(args: Mapping[str, Any], defaults: Mapping[str, Any]) -> Dict[str, Any]:
    """The settings of a run that differ from the defaults of train.py, by name."""
    return {
        name: value
        for name, value in args.items()
        if name not in _ELSEWHERE and (name not in defaults or defaults[name] != value) and value != ''
    }


def show_origin(facts: Mapping[str, Optional[str]], settings: Mapping[str, Any]) -> str:
    """The section of what was run.

    Args:
        facts: Values by title. Those that are None are left out.
        settings: Settings that differ from the defaults.
    """
    rows = [f'<span>{text(title)}</span> {text(value)}' for title, value in facts.items() if value]
    chips = [f'<code>--{text(key.replace("_", "-"))}{_value(value)}</code>' for key, value in settings.items()]
    flags = ''
    if chips:
        title = f'{len(chips)} settings that differ from the defaults of train.py'
        flags = f'<details><summary>{title}</summary>{listed(chips, "flags")}</details>'
    return section('run', 'What was run', listed(rows, 'facts'), flags)


def _value(value: Any) -> str:
    if value is True:
        return ''
    if isinstance(value, Mapping):
        value = ' '.join(f'{key}={item}' for key, item in value.items())
    if isinstance(value, (list, tuple)):
        value = ' '.join(map(str, value))
    return f' <b>{text(value)}</b>'
