"""Look into a checkpoint, or write its backbone as safetensors for plain timm

python -m timm_coretune.checkpoint inspect SOURCE
python -m timm_coretune.checkpoint convert SOURCE DESTINATION.safetensors
"""

import argparse
import sys
from typing import List, Optional

from timm.models import create_model
from timm.utils import ParseKwargs

from .inspection import convert_checkpoint, inspect_checkpoint
from .report import CheckpointReport


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('python -m timm_coretune.checkpoint', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (('inspect', 'tell what a checkpoint holds'), ('convert', 'write its backbone for timm')):
        command = commands.add_parser(name, help=text)
        command.add_argument('source', metavar='SOURCE', help='file, folder, hf-hub:owner/name, URL or short name')
        if name == 'convert':
            command.add_argument('destination', metavar='DESTINATION', help='file to write, .safetensors')
        command.add_argument('--model', metavar='NAME', help='timm model to read it for (default: the first that fits)')
        command.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
        command.add_argument('--checkpoint-key', metavar='KEY', help='copy to take, where there are several')
    return parser


def run(arguments: Optional[List[str]] = None) -> CheckpointReport:
    args = create_parser().parse_args(arguments)
    model = create_model(args.model, num_classes=0, **args.model_kwargs) if args.model else None
    if args.command == 'inspect':
        report = inspect_checkpoint(args.source, model, args.checkpoint_key)
        print(report)
        return report
    report = convert_checkpoint(args.source, args.destination, model, args.checkpoint_key)
    name, *kwargs = report.architecture.split(', ')
    kwargs += [f'{key}={value!r}' for key, value in args.model_kwargs.items()]
    print(report)
    call = ', '.join([repr(name), 'num_classes=0', *kwargs, f'checkpoint_path={args.destination!r}'])
    print(f'{"load it":13}timm.create_model({call})')
    return report


if __name__ == '__main__':
    try:
        run()
    except ValueError as e:
        sys.exit(f'Error: {e}')
