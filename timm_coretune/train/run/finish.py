"""How a run ends: what came out, where it is, and on its way to the Hub"""

import argparse
import json
import logging
import os
import shlex
import sys
from typing import Any, Dict, List

from timm.utils import unwrap_model

from ...evaluation.scores import SCORES
from ...hub.push import push_command, push_run
from ...hub.upload import NOT_PUSHED, HubError
from ...report.plots import plot_confusion, plot_curves
from ...run_folder import BEST_WEIGHTS_NAME, CONFUSION_NAME, CONFUSION_PICTURE_NAME, CURVES_NAME, SUMMARY_NAME
from ..data.datasets import Datasets
from ..loop import Trainer
from ..segmentation import draw_predictions
from .record import RunRecord

_logger = logging.getLogger(__name__)


def continue_command(argv: List[str], folder: str) -> str:
    """The command that continues an interrupted run in its folder."""
    output, name = os.path.split(os.path.abspath(folder))
    words = ['--output', output, '--experiment', name, '--resume', 'auto']
    # neither a __main__.py nor the script timm-coretune can be launched with the flags of training alone
    installed = os.path.basename(sys.argv[0]) in ('__main__.py', 'timm-coretune', 'timm-coretune-train')
    script = '-m timm_coretune.train' if installed else shlex.quote(sys.argv[0])
    return f'accelerate launch {script} {shlex.join([*argv, *words])}'


def summarize(record: RunRecord, trainer: Trainer, args: argparse.Namespace, datasets: Datasets) -> None:
    """Say what came out and where it is."""
    metric, epoch = trainer.best
    if metric is None:
        return
    _logger.info(f'*** Best metric: {metric} (epoch {epoch})')
    if record.last_row is not None:
        name = f'eval_{args.eval_metric}'
        last = record.last_row.get(name, record.last_row['train_loss'])
        _logger.info(f'Last epoch: {last}. The best was chosen on these very images, the last was not.')
    weights = record.path(BEST_WEIGHTS_NAME)
    _logger.info(f'Weights: {weights}')
    if args.segmentation:
        _logger.info(f"Load them: timm_coretune.load_segmentation_model('{record.folder}')")
    else:
        num_classes = unwrap_model(trainer.task.get_eval_model()).num_classes
        kwargs = ''.join(f', {k}={v!r}' for k, v in {'num_classes': num_classes, **args.model_kwargs}.items())
        _logger.info(f"Load them: timm.create_model('{args.model}'{kwargs}, checkpoint_path='{weights}')")
    try:
        plot_curves(record.path(SUMMARY_NAME), record.path(CURVES_NAME))
        _logger.info(f'Curves: {record.path("curves.png")}')
        if os.path.exists(record.path(CONFUSION_NAME)):
            plot_confusion(record.path(CONFUSION_NAME), record.path(CONFUSION_PICTURE_NAME))
            _logger.info(f'Confusion matrix: {record.path("confusion.png")}')
        if args.segmentation and datasets.validation is not None:
            _logger.info(f'Predictions: {draw_predictions(record.folder, datasets.validation)}')
    except ImportError as e:
        _logger.info(str(e))


def push(args: argparse.Namespace, folder: str, is_over: bool) -> None:
    """Push the run, and say how to try again before a failure can keep it from saying so.

    Raises:
        SystemExit: It was trained, but not pushed.
    """
    command = push_command(folder, args.push_to_hub, args.hub_private, args.hub_revision)
    try:
        if not is_over:
            raise HubError('the run was interrupted. Continue it, or push what there is.')
        _logger.info(f'Pushing to {args.push_to_hub}. Should that be cut off, this does it again:\n{command}')
        url = push_run(folder, args.push_to_hub, args.hub_private, args.hub_revision)
    except (HubError, ValueError, KeyboardInterrupt) as e:
        reason = 'interrupted.' if isinstance(e, KeyboardInterrupt) else e
        _logger.error(f'Trained, but not pushed: {reason}\nEverything is in {folder}. Try again with:\n{command}')
        raise SystemExit(NOT_PUSHED) from None
    _logger.info(f'Pushed: {url}')
    if args.segmentation:
        _logger.info(f"Load it: timm_coretune.load_segmentation_model('hf-hub:{args.push_to_hub}')")
    else:
        _logger.info(f"Load it: timm.create_model('hf-hub:{args.push_to_hub}', pretrained=True)")


def print_results(results: List[Dict[str, Any]], eval_metric: str) -> None:
    """Print the ten best epochs as JSON, as timm's script does."""
    results = [{k: v for k, v in result.items() if v is not None} for result in results]
    results.sort(
        key=lambda result: result.get('validation', result.get('train')).get(eval_metric, 0),
        reverse=not SCORES[eval_metric].higher_is_better,
    )
    print(f'--result\n{json.dumps(results[-10:], indent=4)}')
