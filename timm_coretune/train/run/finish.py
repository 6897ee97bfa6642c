"""The end of a run: logs the results, draws pictures and pushes to the Hub"""

import json
import logging
import os
import sys
from typing import Any, Dict, List, Mapping, Optional

from accelerate import Accelerator

from ...atomic import write_text
from ...evaluation.scores import SCORES, Evaluator, describe_value, for_ranking
from ...export import write_json
from ...hub.connection import NOT_PUSHED, HubError
from ...hub.push import push_command, push_run
from ...redaction import join_command, redact
from ...report.plots import plot_confusion, plot_curves
from ...run_folder import (
    ARGS_NAME,
    BEST_WEIGHTS_NAME,
    CONFUSION_NAME,
    CONFUSION_PICTURE_NAME,
    CURVES_NAME,
    EVAL_PREFIX,
    RESULTS_NAME,
    SUMMARY_NAME,
    read_summary,
)
from ..cli.arguments import create_parser
from ..cli.settings import OutputSettings
from ..loop import Trainer
from ..processes import is_sharded
from .folder import find_newest_state
from .record import RunRecord

_logger = logging.getLogger(__name__)


# what a run was started with that one which continues it does not need, by flag: whether the flag has a value
_OF_THE_START = {'--start-epoch': True, '--no-resume-opt': False}


def _with_flags(argv: List[str], flags: Mapping[str, str]) -> List[str]:
    """The words of a command line with other values for these flags, each in its place, or else at the end."""
    known = {name for action in create_parser()._actions for name in action.option_strings}
    left, words = dict(flags), []
    rest = iter(argv)
    for word in rest:
        flag, has_value, _ = word.partition('=')
        meant = [name for name in known if name == flag] or [name for name in known if name.startswith(flag)]
        name = meant[0] if flag.startswith('--') and len(meant) == 1 else ''
        if name not in flags and name not in _OF_THE_START:
            words.append(word)
            continue
        if not has_value and _OF_THE_START.get(name, True):
            next(rest, None)
        if name in left:
            words += [name, left.pop(name)]
    return [*words, *(word for pair in left.items() for word in pair)]


def continue_command(argv: List[str], folder: str) -> str:
    """The shell command that continues an interrupted run in its folder."""
    output, name = os.path.split(os.path.abspath(folder))
    words = _with_flags(argv, {'--output': output, '--experiment': name, '--resume': 'auto'})
    # accelerate cannot launch a __main__.py or an installed script by its path with the flags of training alone
    installed = os.path.basename(sys.argv[0]) in ('__main__.py', 'timm-coretune', 'timm-coretune-train')
    script = ['-m', 'timm_coretune.train'] if installed else [sys.argv[0]]
    return join_command(['accelerate', 'launch', *script, *words])


def describe_continuation(argv: List[str], record: RunRecord, accelerator: Accelerator) -> str:
    """How a run that stopped before its end is continued: the end of a sentence that begins with why it stopped."""
    if is_sharded(accelerator):
        return (
            f'. {accelerator.distributed_type.value} shards the state, so none is saved and the run cannot be '
            f'continued. Weights of the best epoch so far, if one has ended, are in {BEST_WEIGHTS_NAME}: a new run can '
            'start from them with --initial-checkpoint.'
        )
    # the file of a state may be complete although the record has not noted it yet
    if record.last_state or (record.folder and find_newest_state(record.folder)):
        also = '\nAdd what accelerate launch was given, such as --config_file.' if accelerator.num_processes > 1 else ''
        return f'. Continue with:\n{continue_command(argv, record.folder)}{also}'
    return ' in the first epoch, before a checkpoint: start anew to continue.'


def reason_to_stop(trainer: Trainer, epochs: range, num_epochs: int) -> str:
    """Why a run that is continued has nothing left to train, in one sentence. Empty if it has.

    Args:
        trainer: Has the best score of the run so far.
        epochs: Epochs that are left, up to the one at which the run stops.
        num_epochs: Epochs of the schedule.
    """
    done = f'This run is over: all its {epochs.stop} epochs are trained'
    flag = 'more --epochs'
    if epochs.stop < num_epochs:
        done = f'This run has trained {epochs.stop} of {num_epochs} epochs, after which --stop-epoch stops it'
        flag = 'a larger --stop-epoch'
    if len(epochs):
        if trainer.best[1] is None or not trainer.is_out_of_patience(epochs.start - 1):
            return ''
        config = trainer.config
        done = f'This run is over: it stopped after {config.patience} validations without a better {config.eval_metric}'
        flag = 'a larger --patience'
    return f'{done}, so nothing is trained; ask for {flag} to train on, or for another --experiment to start anew.'


def log_best(record: RunRecord, trainer: Trainer, load_hint: str) -> None:
    """Log the scores of the best and the last epoch, and where the best weights are.

    Args:
        record: Has the run folder and the score of the last epoch.
        trainer: Has the best score and its epoch.
        load_hint: A line of Python that loads the best weights.
    """
    metric, epoch = trainer.best
    assert metric is not None
    name = record.eval_metric
    _logger.info(f'*** Best metric: {describe_value(name, metric)} (epoch {epoch})')
    if record.last_row is not None:
        last = record.last_row.get(f'{EVAL_PREFIX}{name}', record.last_row['train_loss'])
        _logger.info(
            f'Last epoch: {describe_value(name, float(last))}. The best was chosen on these very images, the last was '
            'not.'
        )
    _logger.info(f'Weights: {record.path(BEST_WEIGHTS_NAME)}')
    _logger.info(f'Load them: {load_hint}')


def draw_tables(record: RunRecord) -> None:
    """Draw the learning curves of a run, and its confusion matrix if there is one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not read_summary(record.path(SUMMARY_NAME)):  # a run that was over already, continued in another folder
        return
    plot_curves(record.path(SUMMARY_NAME), record.path(CURVES_NAME))
    _logger.info(f'Curves: {record.path(CURVES_NAME)}')
    if os.path.exists(record.path(CONFUSION_NAME)):
        plot_confusion(record.path(CONFUSION_NAME), record.path(CONFUSION_PICTURE_NAME))
        _logger.info(f'Confusion matrix: {record.path(CONFUSION_PICTURE_NAME)}')


def push(settings: OutputSettings, folder: str, is_over: bool) -> None:
    """Push the run to the Hub. The command to try again is logged first, in case the process is killed.

    Raises:
        SystemExit: The run was trained, but not pushed.
    """
    repo_id: Optional[str] = settings.push_to_hub
    assert repo_id is not None
    command = push_command(folder, repo_id, settings.hub_private, settings.hub_revision)
    try:
        if not is_over:
            raise HubError('the run was interrupted. Continue it, or push what there is.')
        _logger.info(f'Pushing to {repo_id}. Should that be cut off, this does it again:\n{command}')
        url = push_run(folder, repo_id, settings.hub_private, settings.hub_revision)
    except (Exception, KeyboardInterrupt) as e:  # whatever it is: the run is there, and how to push it is said
        reason = str(e) if isinstance(e, (HubError, ValueError)) else f'{type(e).__name__}: {e}'
        reason = 'interrupted.' if isinstance(e, KeyboardInterrupt) else redact(reason)
        _logger.error(f'Trained, but not pushed: {reason}\nEverything is in {folder}. Try again with:\n{command}')
        raise SystemExit(NOT_PUSHED) from None
    _logger.info(f'Pushed: {url}')


def write_results(folder: str, scores: Mapping[str, float], scored: Evaluator, args_text: str) -> None:
    """Write what --eval-only found: its scores, the tables of the evaluator that has them, and the arguments.

    Raises:
        ValueError: The folder cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        write_json(dict(scores), os.path.join(folder, RESULTS_NAME))
        scored.write(folder)
        write_text(args_text, os.path.join(folder, ARGS_NAME))
    except OSError as e:
        raise ValueError(f'Expected a folder for results in {folder!r}: {e}. Choose another --eval-output.') from e
    _logger.info(f'Results: {folder}')


def print_results(results: List[Dict[str, Any]], eval_metric: str) -> None:
    """Print the ten best epochs as JSON, as timm's script does."""
    results = [{k: v for k, v in result.items() if v is not None} for result in results]
    results.sort(
        key=lambda result: for_ranking(eval_metric, (result.get('validation') or result['train']).get(eval_metric, 0)),
        reverse=not SCORES[eval_metric].higher_is_better,
    )
    print(f'--result\n{json.dumps(results[-10:], indent=4)}')
