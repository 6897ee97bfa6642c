"""Convert annotations of other programs to the images and masks that train.py --segmentation reads

timm-coretune masks convert coco instances_val2017.json --images val2017 --split val --output FOLDER
timm-coretune masks convert labelme FOLDER_OF_JSON --output FOLDER
timm-coretune masks convert cityscapes CITYSCAPES --output FOLDER
timm-coretune masks convert ade20k ADEChallengeData2016 --output FOLDER
timm-coretune masks convert colors FOLDER_OF_MASKS --colors FILE --output FOLDER
"""

import argparse
import logging
from typing import Any, List, Optional

from timm.utils import setup_default_logging

from ..data.dataset import read_class_names
from .coco import open_coco
from .folders import open_ade20k, open_cityscapes, open_colors
from .labelme import open_labelme
from .output import Conversion, check_split, write


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('timm-coretune masks', description=(__doc__ or '').split('\n')[0])
    convert = parser.add_subparsers(dest='command', required=True).add_parser(
        'convert', help='write images, masks and classes.txt to a folder'
    )
    formats = convert.add_subparsers(dest='format', required=True)

    def add_format(name: str, text: str, metavar: str, source: str, with_split: bool = True) -> Any:
        command = formats.add_parser(name, help=text)
        add = command.add_argument
        add('source', metavar=metavar, help=source)
        add('--output', required=True, metavar='FOLDER', help='folder to write to, created if missing')
        if with_split:
            add('--split', default='', metavar='NAME', help='name of the split to write, such as train or val')
        add('--overwrite', action='store_true', help='replace a split that is there already')
        add('--hard-link', action='store_true', help='give the files of images a second name, do not copy them')
        return add

    missing = 'leave out images that are not there, or have no mask; they are counted'
    add = add_format(
        'coco', "COCO's JSON of instances: polygons and RLE", 'JSON', 'file such as instances_val2017.json'
    )
    add('--images', required=True, metavar='FOLDER', help='folder of the images')
    add('--no-background', action='store_true', help='leave out pixels without an instance, and have no background')
    add('--crowd', choices=['ignore', 'class'], default='ignore', help='what regions of crowds are (default: ignore)')
    add('--skip-missing', action='store_true', help=missing)
    add = add_format('labelme', 'JSON files of labelme', 'FOLDER', 'folder of the JSON files')
    add('--images', default='', metavar='FOLDER', help='folder of the images (default: that of the JSON files)')
    add(
        '--classes', default='', metavar='FILE', help='file with the name of a class in each line (default: all labels)'
    )
    add('--skip-missing', action='store_true', help=missing)
    for name, text, metavar in (
        ('cityscapes', 'gtFine of Cityscapes, in the 19 classes to train on', 'CITYSCAPES'),
        ('ade20k', 'ADE20K for scene parsing, in its 150 classes', 'ADE20K'),
    ):
        add = add_format(name, text, metavar, 'folder of the data set', with_split=False)
        add('--skip-missing', action='store_true', help=missing)
    add = add_format('colors', 'masks in colours', 'FOLDER', 'folder of images and masks that train.py reads')
    add('--colors', required=True, metavar='FILE', help='file with a line `R G B name` for each class')
    return parser


def plan_conversion(args: argparse.Namespace) -> Conversion:
    """What the arguments of a command ask to write."""
    if args.format == 'coco':
        split, is_class = check_split(args.split), args.crowd == 'class'
        return open_coco(args.source, args.images, split, not args.no_background, is_class, args.skip_missing)
    if args.format == 'labelme':
        split, known = check_split(args.split), read_class_names(args.output)
        return open_labelme(args.source, args.images, split, args.classes, known, args.skip_missing)
    if args.format == 'cityscapes':
        return open_cityscapes(args.source, args.skip_missing)
    if args.format == 'ade20k':
        return open_ade20k(args.source, args.skip_missing)
    return open_colors(args.source, args.colors, args.split, check_split(args.split))


def main(arguments: Optional[List[str]] = None) -> None:
    """Run one command as a program: an error is printed in one line and the exit status is 2."""
    parser = create_parser()
    args = parser.parse_args(arguments)
    setup_default_logging(default_level=logging.INFO)
    try:
        plan = plan_conversion(args)
        write(plan, args.output, args.overwrite, args.hard_link)
    except (ImportError, OSError, ValueError) as e:
        parser.error(str(e))
    print(plan.describe())
    print(f'Written: {args.output}')


if __name__ == '__main__':
    main()
