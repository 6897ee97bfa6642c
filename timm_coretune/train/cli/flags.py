"""The flags of train.py: ours, in four groups, and timm's"""

import argparse
import difflib
from typing import List, Optional

from ...segmentation.decoder import HEADS
from .timm_flags import add_timm_flags

PRESETS = ('cnn', 'vit')


class _Parser(argparse.ArgumentParser):
    """Answers an unknown flag with the nearest one."""

    def parse_args(self, args: Optional[List[str]] = None, namespace: Optional[argparse.Namespace] = None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition('=')[0]
            near = difflib.get_close_matches(name, [flag for a in self._actions for flag in a.option_strings], n=1)
            self.error(f'unrecognized arguments: {" ".join(unknown)}' + (f' (nearest: {near[0]})' if near else ''))
        return namespace


def create_parser() -> argparse.ArgumentParser:
    """The parser of train.py, one function for each group of its help."""
    parser = _Parser(
        prog='train.py',
        description='Fine-tune a pretrained timm model on labelled images or masks, with --coretune by Core-tuning.',
        epilog='Without --data-dir and --dataset a bundled sample of Fashion-MNIST is used.',
    )
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file of defaults; flags win over it')
    _add_coretune(parser)
    _add_tuning(parser)
    _add_segmentation(parser)
    _add_hub(parser)
    add_timm_flags(parser)
    return parser


def _add_coretune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Core-tuning').add_argument
    add('--coretune', action='store_true', help='Core-tuning; without it plain cross-entropy tuning')
    add(
        '--contrast-weight', type=float, default=0.1, metavar='W', help='weight of the contrast (default: 0.1), 0: none'
    )
    add('--coretune-alpha', type=float, default=1.0, metavar='A', help='mixtures by Beta(A, A), > 0 (default: 1)')
    add(
        '--coretune-min-positive-lam', type=float, default=0.0, metavar='R',
        help='least share of the hardest positive in its mixture, 0 to 1 (default: 0)',
    )  # fmt: skip
    add('--contrast-temperature', type=float, default=0.07, metavar='T', help='divides cosines, > 0 (default: 0.07)')
    add('--projection-dim', type=int, default=256, metavar='N', help='width of the contrasted embedding (default: 256)')
    add('--no-coretune-gather', action='store_true', help='mine and contrast within each process only')


def _add_tuning(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('tuning a pretrained model').add_argument
    add('--preset', choices=PRESETS, help='defaults for tuning that kind of model (docs/flags.md), any flag wins')
    add('--checkpoint-key', metavar='KEY', help='which copy of the backbone in a checkpoint to take, by its prefix')
    add('--allow-partial', action='store_true', help='load a checkpoint although parts of the backbone are missing')
    add('--freeze-epochs', type=int, default=0, metavar='N', help='epochs in which only the head trains (default: 0)')
    add('--head-lr-scale', type=float, default=1.0, metavar='X', help='learning rate factor of the head (default: 1)')
    add('--class-balance', action='store_true', help='batches in which every class appears at least twice')
    add(
        '--label-fraction', type=float, default=1.0, metavar='R',
        help='use this share of the training images of each class, drawn by --seed (default: 1)',
    )  # fmt: skip
    add('--patience', type=int, metavar='N', help='stop after N validations without a better one')
    add('--eval-only', action='store_true', help='validate and stop, as --epochs 0 does')
    add('--metrics', default='', metavar='LIST', help='more metrics, comma-separated: confusion, per-class, ece')
    add('--log-with', default='', metavar='LIST', help='trackers of accelerate, comma-separated, such as tensorboard')


def _add_segmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('segmentation (docs/segmentation.md)').add_argument
    add('--segmentation', action='store_true', help='classify the pixels of images with masks')
    add(
        '--segmentation-head', choices=HEADS,
        help='on the feature maps (default: fpn where the last is coarser than 1/16, else deeplabv3)',
    )  # fmt: skip
    add(
        '--anchors-per-image', type=int, default=64, metavar='N',
        help='pixels of an image that --coretune contrasts (default: 64)',
    )  # fmt: skip
    add('--reduce-zero-label', action='store_true', help='masks hold 0 for pixels to ignore, classes from 1 on')


def _add_hub(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('publishing (docs/hub.md)').add_argument
    add('--push-to-hub', metavar='OWNER/NAME', help='push the best weights to this repository when training is over')
    add('--hub-private', action='store_true', help='make the repository private')
    add('--hub-revision', metavar='REV', help='branch to push to, made if need be (default: main)')
