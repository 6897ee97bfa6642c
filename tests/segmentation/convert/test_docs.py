"""The commands in docs/segmentation.md convert what they say"""

import re
import shlex

import numpy as np
import pytest
from annotations import save_image, save_mask, write_ade20k, write_cityscapes, write_coco, write_labelme
from paths import ROOT

from timm_coretune.__main__ import main
from timm_coretune.segmentation.convert.__main__ import create_parser
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.segmentation import open_datasets

PAGE = (ROOT / 'docs' / 'segmentation.md').read_text()
COMMANDS = re.findall(r'^timm-coretune (masks convert .*)$', PAGE, re.MULTILINE)


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    """A folder with what the commands read, in which all of them were run in their order."""
    folder = tmp_path_factory.mktemp('docs')
    for split in ('train', 'val'):
        write_coco(folder, split)
    write_cityscapes(folder / 'Cityscapes')
    write_ade20k(folder / 'ADEChallengeData2016')
    for stem in ('a', 'b'):
        write_labelme(folder / 'annotated', stem)
        save_image(folder / 'painted' / 'images' / f'{stem}.jpg', (3, 2))
        save_mask(folder / 'painted' / 'masks' / f'{stem}.png', np.full((2, 3, 3), (128, 0, 0)))
    (folder / 'colors.txt').write_text('0 0 0 ground\n128 0 0 road\n')
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        for command in COMMANDS:
            main(shlex.split(command))
    return folder


@pytest.mark.parametrize(
    'name, sizes, num_classes',
    [
        ('coco', (3, 3), 4),
        ('cityscapes', (2, 1), 19),
        ('ade20k', (1, 1), 150),
        ('photos', (1, 1), 3),
        ('indexed', (1, 1), 2),
    ],
)
def test_each_command_gives_what_training_reads(converted, name, sizes, num_classes):
    datasets = open_datasets(parse_args(['--segmentation', '--data-dir', str(converted / name)]).settings)
    assert (len(datasets.train), len(datasets.validation)) == sizes
    assert datasets.num_classes == num_classes == len(datasets.class_names)
    for dataset in (datasets.train, datasets.validation):
        assert all(image.shape[1:] == mask.shape for image, mask in dataset)


def test_every_format_has_a_command_and_a_row():
    formats = {word.split()[2] for word in COMMANDS}
    assert formats == set(re.findall(r'^\| `(\w+)` \| .* \| .* \| .* \|$', PAGE.partition('## Annotations')[2], re.M))
    help_text = create_parser()._subparsers._group_actions[0].choices['convert'].format_help()
    assert all(f'    {name} ' in help_text for name in formats)
