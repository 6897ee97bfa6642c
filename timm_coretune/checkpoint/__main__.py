"""Inspect a self-supervised checkpoint, or write its backbone as safetensors for plain timm

python -m timm_coretune.checkpoint inspect SOURCE
python -m timm_coretune.checkpoint convert SOURCE DESTINATION.safetensors
"""

import argparse
import sys
from typing import List, Optional

from timm.models import create_model
from timm.utils.misc import ParseKwargs

from ..redaction import redacted_output
from .load import convert_checkpoint, inspect_checkpoint
from .report import CheckpointReport


def create_parser() -> argparse.ArgumentParser:
    """Parser of `inspect` and `convert`, which share their options."""
    parser = argparse.ArgumentParser('python -m timm_coretune.checkpoint', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (
        ('inspect', 'show what a checkpoint holds and which timm model it fits'),
        ('convert', 'write the backbone of a checkpoint as a safetensors file that timm loads'),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            'source',
            metavar='SOURCE',
            help='checkpoint to read: a file, a folder, hf-hub:owner/name, an https URL or a short name',
        )
        if name == 'convert':
            command.add_argument('destination', metavar='DESTINATION', help='file to write, ending in .safetensors')
        command.add_argument(
            '--model',
            metavar='NAME',
            help='timm model to read the checkpoint for (default: the first timm model that the checkpoint fits)',
        )
        command.add_argument(
            '--model-kwargs',
            nargs='*',
            default={},
            action=ParseKwargs,
            metavar='KEY=VALUE',
            help='arguments for creating the timm model of --model, such as num_heads=12',
        )
        if name == 'convert':
            command.add_argument(
                '--allow-differences',
                action='store_true',
                help='write the backbone although the config beside it differs from the model, as in layer_norm_eps',
            )
        command.add_argument(
            '--checkpoint-key',
            metavar='KEY',
            help='copy of the encoder to take from a checkpoint that holds several, such as student or encoder_k',
        )
    return parser


def run(arguments: Optional[List[str]] = None) -> CheckpointReport:
    """Run one command and print its report.

    Args:
        arguments: Words of the command line, None for those of this process.

    Raises:
        ValueError: The checkpoint cannot be read, or fits no model.
    """
    args = create_parser().parse_args(arguments)
    model = create_model(args.model, num_classes=0, **args.model_kwargs) if args.model else None
    if args.command == 'inspect':
        report = inspect_checkpoint(args.source, model, args.checkpoint_key)
        print(report)
        return report
    report = convert_checkpoint(args.source, args.destination, model, args.checkpoint_key, args.allow_differences)
    print(report)
    print(f'{"load it":13}{report.call(args.destination, num_classes=0)}')
    return report


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    """Run one command as a program: an error is printed in one line and the exit status is 1."""
    try:
        run(arguments)
    except ValueError as e:
        sys.exit(f'Error: {e}')


if __name__ == '__main__':
    main()
