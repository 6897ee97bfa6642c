"""Average weights: of a run with those that it started from (WiSE-FT), or of several runs (model soups)

python -m timm_coretune.averaging RUN --output FOLDER
python -m timm_coretune.averaging RUN RUN ... --greedy --output FOLDER
"""

import argparse
import logging
import os
import sys
from typing import List, Optional

from ..redaction import expand_home, redacted_output
from ..run_folder import BEST_WEIGHTS_NAME, MILESTONE_PREFIX, STATE_SUFFIX, read_args
from ..train.cli.errors import sentence_of
from .choosing import Chooser, greedy_soup, sweep, uniform_soup
from .output import OPTIMISTIC, check_output, check_same_model, read_config, table, write_average
from .start import load_start
from .validation import Validation, parse_run
from .weights import StoredState

_logger = logging.getLogger(__name__)
_IMAGES = ('data_dir', 'dataset', 'val_split', 'val_fraction')  # settings that say which images are validated
_ALPHAS = tuple(n / 10 for n in range(11))


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'timm-coretune average',
        description='Average the weights of one run with those that it started from (WiSE-FT), or those of several '
        'runs (model soups), validate, and write a model that plain timm loads.',
    )
    add = parser.add_argument
    add('runs', metavar='RUN', nargs='+', help='output folder of train.py; several for a soup')
    add('--output', metavar='FOLDER', required=True, help='folder to write the model to, new or empty')
    add('--alpha', metavar='A', type=float, nargs='+', help='shares of the tuned weights to try (default: 0 0.1 ... 1)')
    add(
        '--start', metavar='FILE', help='weights at alpha 0, with their head (default: those that the run started from)'
    )
    add('--greedy', action='store_true', help='add runs to the soup only if the validation does not get worse')
    add(
        '--update-bn',
        type=int,
        default=1024,
        metavar='N',
        help='training images from which statistics of BatchNorm are computed, 0: average them (default: %(default)s)',
    )
    add('--data-dir', metavar='DIR', help='data to validate on (default: that of the run)')
    add('--device', help='device to compute on, such as cpu or cuda (default: that of the run)')
    add('-j', '--workers', type=int, metavar='N', help='processes that load images (default: as in the run)')
    return parser


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    several = len(args.runs) > 1
    for flag, given, fits, needed in (
        ('--alpha', args.alpha, not several, 'one run'),
        ('--start', args.start, not several, 'one run'),
        ('--greedy', args.greedy, several, 'several runs'),
    ):
        if given and not fits:
            parser.error(f'{flag} needs {needed}, got {len(args.runs)}')
    outside = [alpha for alpha in args.alpha or () if not 0 <= alpha <= 1]
    if outside:
        parser.error(f'--alpha: expected shares of the tuned weights from 0 to 1, got {outside[0]:g}')
    if args.update_bn < 0:
        parser.error(f'--update-bn: expected 0 or a number of images, got {args.update_bn}')
    if len({os.path.realpath(run) for run in args.runs}) < len(args.runs):
        parser.error('expected different runs, got one of them twice')


def _weights_of(run: str) -> str:
    path = os.path.join(run, BEST_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f'Expected {BEST_WEIGHTS_NAME} in {run!r}, found none. Name the output folder of a run whose first epoch '
            'is over.'
        )
    return path


def _hint_at_probe(run: str, freeze_epochs: int) -> None:
    """Say that the run has the state after its linear probing, if it has."""
    probe = os.path.join(run, f'{MILESTONE_PREFIX}{freeze_epochs}{STATE_SUFFIX}')
    if freeze_epochs and os.path.isfile(probe):
        _logger.info(
            f'{probe} has a head that was trained on the frozen backbone. --start {probe} interpolates from it.'
        )


def _warn_of_other_images(runs: List[str]) -> None:
    """Warn if runs were validated on different images, of which one may have trained on those of another."""
    first, *others = [{name: read_args(run).get(name) for name in _IMAGES} for run in runs]
    for run, args in zip(runs[1:], others, strict=True):
        different = [name for name in _IMAGES if args[name] != first[name]]
        if different:
            _logger.warning(
                f'{run} was not validated on the images of {runs[0]}: {", ".join(different)} differ. If it trained '
                'on some of them, the figures flatter it. Choose by images that no run trained on: --data-dir.'
            )


def run(arguments: Optional[List[str]] = None) -> None:
    """Average and write.

    Raises:
        ValueError: A run, its data or its start cannot be used, or runs are of different models.
    """
    parser = create_parser()
    args = parser.parse_args(arguments)
    _check(args, parser)
    args.runs = [expand_home(run) for run in args.runs]
    check_output(args.output)
    flags = {'--data-dir': args.data_dir, '--device': args.device, '--workers': args.workers}
    overrides = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    first, parsed = args.runs[0], parse_run(args.runs[0], overrides)
    states = [StoredState(_weights_of(run)) for run in args.runs]
    check_same_model(args.runs)
    _warn_of_other_images(args.runs)
    chooser = Chooser(Validation(parsed, states[0].path, args.update_bn > 0), args.update_bn)
    if len(args.runs) == 1:
        if args.start is None:
            _hint_at_probe(first, parsed.settings.optimization.freeze_epochs)
        start = load_start(parsed.settings, int(read_config(first)['num_classes']), args.start)
        what = sweep(chooser, states[0], start, args.alpha or _ALPHAS)
    else:
        common = os.path.commonpath([os.path.abspath(run) for run in args.runs])
        names = [os.path.relpath(run, common) for run in args.runs]
        what = (greedy_soup if args.greedy else uniform_soup)(chooser, states, names)
    assert chooser.best is not None
    write_average(args.output, first, chooser.state, what, chooser.rows, chooser.best)
    lines = table(chooser.rows, chooser.best)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print('  '.join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    print(f'Written: {args.output}, {what}. {OPTIMISTIC}')


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command. What the user can mend ends in one line, with exit code 2."""
    try:
        run(arguments)
    except Exception as e:
        sentence = sentence_of(e)
        if sentence is None:
            raise
        print(f'timm-coretune average: error: {sentence}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
