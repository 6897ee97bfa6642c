"""Predict the masks of images with a trained model, or write the bundled sample of scenes to a folder

python -m timm_coretune.segmentation predict MODEL IMAGES ... --output FOLDER
python -m timm_coretune.segmentation sample FOLDER
"""

import argparse
import logging
from importlib import resources
from typing import List, Optional

import torch
from timm.utils import setup_default_logging

from ..redaction import redacted_output
from .data.scenes import FashionScenes, write_voc
from .export import load_segmentation_model
from .outputs import plan_outputs
from .predict import write_outputs

_SAMPLE_NAME = 'fashion_mnist_sample.safetensors'


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('python -m timm_coretune.segmentation', description=(__doc__ or '').split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    add = commands.add_parser('predict', help='write the predicted mask of every image as a palette PNG').add_argument
    add('model', metavar='MODEL', help='trained model: output folder of train.py, or hf-hub:OWNER/NAME')
    add('images', metavar='IMAGES', nargs='+', help='image files, or folders of images')
    add('--output', required=True, metavar='FOLDER', help='folder to write the masks to, created if missing')
    add('--overwrite', action='store_true', help='predict masks again that exist already; otherwise they are skipped')
    add(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='device to compute on, such as cpu or cuda (default: %(default)s)',
    )
    add = commands.add_parser(
        'sample', help='write the bundled sample of scenes in the layout of PASCAL VOC'
    ).add_argument
    add('folder', metavar='FOLDER', help='folder to write the sample to, created if missing')
    return parser


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    parser = create_parser()
    args = parser.parse_args(arguments)
    setup_default_logging(default_level=logging.INFO)
    if args.command == 'sample':
        path = str(resources.files('timm_coretune') / 'assets' / _SAMPLE_NAME)
        for split in ('train', 'validation'):
            write_voc(FashionScenes(path, split), args.folder, split)
        print(f'Written: {args.folder}')
        return
    try:
        outputs = plan_outputs(args.images, args.output, args.overwrite)  # before a model is downloaded
        num_masks = write_outputs(load_segmentation_model(args.model, args.device), outputs)
    except ValueError as e:
        parser.error(str(e))
    print(f'Written: {num_masks} masks to {args.output}')


run = main  # the former name

if __name__ == '__main__':
    main()
