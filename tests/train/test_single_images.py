"""Batches that a model cannot be trained on are refused before a run writes anything"""

import pytest
import timm
import torch
from runs import results_of, train

from timm_coretune.segmentation import create_segmentation_model
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.model import check_single_images


def check(*flags, model='test_resnet', size=32, num_processes=1):
    settings = parse_args(['--model', 'test_resnet', *flags]).settings
    model = timm.create_model(model) if isinstance(model, str) else model
    check_single_images(settings, model, {'input_size': (3, size, size)}, num_processes)


@pytest.mark.parametrize(
    ('flags', 'told'),
    [
        (('-b', '1'), 'got --batch-size 1: BatchNorm of test_resnet .* of 32 x 32'),
        (('-b', '1', '--coretune'), 'got --batch-size 1: BatchNorm of test_resnet'),
        (
            ('-b', '2', '--mixup', '0.2', '--mixup-mode', 'half'),
            'size 2: --mixup-mode half leaves half of it',
        ),
        (('--train-img-sizes', '64', '32', '--train-batch-sizes', '1', '1'), 'of 32 x 32 comes to'),
        (('-b', '1', '--sync-bn'), 'or use --sync-bn with several processes'),
    ],
    ids=['plain', 'coretune', 'half', 'sizes', 'sync-bn'],
)
def test_a_batch_of_one_small_image_is_refused(flags, told):
    with pytest.raises(ValueError, match=told):
        check(*flags)


@pytest.mark.parametrize(
    ('flags', 'options'),
    [
        (('-b', '2'), {}),
        (('-b', '1'), {'size': 64}),  # a map of 2 x 2 places has 4 values per channel
        (('-b', '1'), {'model': 'test_vit', 'size': 160}),
        (('-b', '1', '--sync-bn'), {'num_processes': 2}),
        (('-b', '1', '--aug-splits', '2', '--aa', 'rand-m5'), {}),
        (('-b', '1', '--epochs', '2', '--freeze-epochs', '2'), {}),
        (('-b', '4', '--mixup', '0.2', '--mixup-mode', 'half'), {}),
        (('--train-img-sizes', '64', '32', '--train-batch-sizes', '1', '2'), {}),
    ],
    ids=['two', 'larger', 'no-batch-norm', 'sync-bn', 'splits', 'frozen', 'half', 'sizes'],
)
def test_a_batch_that_has_a_variance_is_taken(flags, options):
    check(*flags, **options)


def test_the_pooled_map_of_a_segmentation_head_is_no_obstacle_and_the_model_stays_as_it_was():
    model = create_segmentation_model('test_resnet', 3, img_size=(64, 64), output_stride=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check('-b', '1', '--segmentation', model=model, size=64)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_run_of_single_images_ends_before_its_folder_is_made(images, tmp_path):
    with pytest.raises(ValueError, match='Expected 2 or more images in a batch'):
        results_of(images, tmp_path / 'output', '-b', '1')
    assert not (tmp_path / 'output').exists()
    folder = train(
        images, tmp_path / 'output', '-b', '1', '--img-size', '64', '--epochs', '1', '--label-fraction', '0.2'
    )
    assert (folder / 'summary.csv').exists()
