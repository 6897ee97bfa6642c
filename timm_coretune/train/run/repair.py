"""Brings a run folder to the place at which a state continues: later states, the best weights, the summary"""

import csv
import logging
import os
import shutil
from typing import Any, Dict, List, Optional, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import unwrap_model

from ...atomic import move_into_place
from ...evaluation.scores import is_better
from ...export import save_weights
from ...lora import plain_state_dict
from ...run_folder import (
    BEST_STATE_NAME,
    BEST_WEIGHTS_NAME,
    CONFUSION_NAME,
    PER_CLASS_NAME,
    SET_ASIDE_NAME,
    SUMMARY_NAME,
    read_notes,
    read_summary,
)
from .folder import progress_of, read_state, state_paths
from .resume import Best
from .saver import Saver

_logger = logging.getLogger(__name__)


def _noted_epoch(weights: str) -> Optional[int]:
    """Epoch of a file of weights. None if there is no such file, or if it is damaged."""
    try:
        return int(read_notes(weights)['epoch'])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def set_aside_later(folder: str, place: Tuple[int, int], best_epoch: Optional[int]) -> None:
    """Move what a run has done after a place into a folder of its own, as the run continues from that place.

    Otherwise --resume auto would return to these states. The newest is moved first: after a kill in between, the states
    before it are still those of one run.

    Args:
        folder: The run folder.
        place: Epoch and batch at which the run continues.
        best_epoch: The best epoch before that place.
    """
    later = []
    for path in state_paths(folder):
        try:
            progress = progress_of(read_state(path))
        except ValueError:
            continue
        if progress > place:
            later.append((progress, path))
    if not later:
        return
    number, target = 0, os.path.join(folder, SET_ASIDE_NAME)
    while os.path.exists(target):
        number += 1
        target = os.path.join(folder, f'{SET_ASIDE_NAME}-{number}')
    os.makedirs(target)
    if os.path.exists(os.path.join(folder, SUMMARY_NAME)):
        shutil.copyfile(os.path.join(folder, SUMMARY_NAME), os.path.join(target, SUMMARY_NAME))
    names = [os.path.basename(path) for _, path in sorted(later, reverse=True)]
    epoch = _noted_epoch(os.path.join(folder, BEST_WEIGHTS_NAME))
    if epoch is not None and epoch != best_epoch:
        names += [BEST_WEIGHTS_NAME, BEST_STATE_NAME, CONFUSION_NAME, PER_CLASS_NAME]
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            move_into_place(os.path.join(folder, name), os.path.join(target, name))
    _logger.warning(
        f'The run continues with epoch {place[0]}, batch {place[1]}. What it has done after that is set aside in '
        f'{target!r} ({len(later)} state(s)), so that --resume auto does not return to it.'
    )


def _is_same(weights: str, tensors: Dict[str, torch.Tensor], notes: Dict[str, str]) -> bool:
    try:
        found = load_file(weights)
        noted = read_notes(weights)
    except (OSError, SafetensorError):
        return False
    return (
        all(noted.get(k) == v for k, v in notes.items())
        and found.keys() == tensors.keys()
        and all(torch.equal(found[k], v) for k, v in tensors.items())
    )


def _try_read(path: str) -> Dict[str, Any]:
    try:
        return read_state(path)
    except ValueError:
        return {}


def repair_best(
    saver: Saver,
    folder: str,
    origin: str,
    epoch: int,
    publish_ema: bool,
    further_notes: Dict[str, str],
) -> bool:
    """Write the best weights and the best state again, unless they are intact and of the best epoch.

    Args:
        saver: Saver of the run.
        folder: The run folder.
        origin: Folder of the states before, usually the run folder.
        epoch: The best epoch.
        publish_ema: Whether the best weights are those of the moving average, in epochs in which its score counts.
        further_notes: Notes in the header of the best weights, beside the epoch and the kind of weights.

    Returns:
        Whether the best weights are there now.
    """
    source = os.path.join(origin, os.path.basename(saver.state_of(epoch)))
    best_state, weights = os.path.join(folder, BEST_STATE_NAME), os.path.join(folder, BEST_WEIGHTS_NAME)
    state = _try_read(source)
    if state.get('epoch') != epoch:
        return _noted_epoch(weights) == epoch  # nothing to compare it with
    if _try_read(best_state).get('epoch') != epoch:
        saver.copy_state(source, best_state)
        _logger.info(f'Wrote {best_state!r} again: it was not the state of the best epoch {epoch}.')
    ema_counts = state.get('run_state', {}).get('ema_counts', True)  # states of earlier versions do not tell
    is_ema = publish_ema and ema_counts and 'state_dict_ema' in state
    tensors = state['state_dict_ema' if is_ema else 'state_dict']
    model = unwrap_model(saver.model)
    if tensors.keys() != model.state_dict().keys():
        return _noted_epoch(weights) == epoch
    tensors = plain_state_dict(model, tensors)
    notes = {'epoch': str(epoch), 'weights': 'ema' if is_ema else 'model', **further_notes}
    if not _is_same(weights, tensors, notes):
        save_weights(tensors, weights, **notes)
        _logger.info(f'Wrote {weights!r} again: it did not hold the weights of the best epoch {epoch}.')
    return True


def best_of(eval_metric: str, metrics: Dict[int, float]) -> Best:
    """The best of these scores and its epoch, the first of equal ones."""
    best: Best = (None, None)
    for epoch, metric in sorted(metrics.items()):
        if is_better(eval_metric, metric, best[0]):
            best = (metric, epoch)
    return best


def intact_rows(path: str) -> List[Dict[str, str]]:
    """Rows of a summary.csv without those that are damaged, of which the log tells."""
    try:
        rows = read_summary(path)
    except (csv.Error, UnicodeDecodeError) as e:
        _logger.warning(f'{path!r} is damaged and this state has no copy of its rows: starting a new one. {e}')
        return []
    intact = [row for row in rows if _is_intact(row)]
    if len(intact) < len(rows):
        _logger.warning(
            f'{len(rows) - len(intact)} of {len(rows)} rows of {path!r} are damaged, and this state has no copy of '
            'them: they are left out. The run itself is not affected.'
        )
    return intact


def _is_intact(row: Dict[str, str]) -> bool:
    try:
        int(row['epoch'])
        float(row['train_loss'])
        [float(value) for value in row.values() if value != '']
    except (KeyError, TypeError, ValueError):  # DictReader gives None for what a row lacks, and a list for too much
        return False
    return True
