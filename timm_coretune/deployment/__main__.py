"""Export a tuned model to a file for other programs

python -m timm_coretune.deployment MODEL --format onnx --output model.onnx
"""

import argparse
import os
import sys
from typing import List, Optional

from ..redaction import expand_home, redacted_output
from .files import deploy
from .formats import FORMATS


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'timm-coretune export',
        description='Export a tuned classifier or segmentation model. The file is loaded again and compared with the '
        'model before it appears.',
    )
    add = parser.add_argument
    add('model', metavar='MODEL', help='output folder of train.py, exported folder, weights, or hf-hub:OWNER/NAME')
    add('--format', choices=tuple(FORMATS), default='onnx', help='what to write (default: %(default)s)')
    add('--output', metavar='PATH', help='file to write, of safetensors a folder (default: in the folder of the model)')
    add('--img-size', type=int, nargs='+', metavar='N', help='height and width (default: that of the validation)')
    add('-b', '--batch-size', type=int, metavar='N', help='images that the file takes at once (default: any number)')
    add('--with-preprocessing', action='store_true', help='the file takes pixels as uint8 and returns probabilities')
    add(
        '--tolerance',
        type=float,
        default=1e-3,
        metavar='T',
        help='greatest difference to the model, as a share of its outputs (default: %(default)s)',
    )
    return parser


def _default_output(model: str, format: str) -> str:
    folder = model if os.path.isdir(model) else os.path.dirname(model) if os.path.exists(model) else ''
    return os.path.join(folder, f'model{FORMATS[format].ending}' if FORMATS[format].ending else 'exported')


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command. What the user can mend ends in one line, with exit code 2."""
    parser = create_parser()
    args = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if args.img_size is not None and (len(args.img_size) > 2 or min(args.img_size) < 1):
        parser.error(f'--img-size: expected one size or height and width, got {args.img_size}')
    size = None if args.img_size is None else (args.img_size[0], args.img_size[-1])
    model = expand_home(args.model)
    output = expand_home(args.output or _default_output(model, args.format))
    try:
        exported = deploy(
            model, args.format, output, size, args.batch_size, args.with_preprocessing, args.tolerance
        )  # fmt: skip
    except (ValueError, ImportError, OSError) as e:
        parser.error(' '.join(str(e).split()))
    differences = ', '.join(f'{value:.2g} with {size} image(s)' for size, value in exported.difference.items())
    print(f'Written: {exported.path}')
    print(f'Greatest difference to the model: {differences}; its outputs go up to {exported.largest:.3g}.')


if __name__ == '__main__':
    main()
