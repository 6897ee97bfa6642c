"""What the flags of train.py do to a segmentation"""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from segmentation_runs import FILES, SIZE, last_row, train, write_odd

import timm_coretune


def test_plain_tuning_has_the_cross_entropy_of_pytorch(voc, tmp_path, steps):
    folder = train(voc, tmp_path, '--smoothing', 0)
    assert [loss for *_, loss in steps] == pytest.approx([expected for *_, expected, _ in steps], rel=1e-5)
    assert len(steps) == 2
    assert any((target == 255).any() for _, target, *_ in steps)
    row = last_row(folder)
    assert row['train_loss'] == pytest.approx(sum(expected for *_, expected, _ in steps) / 2, rel=1e-5)
    assert 'train_contrast' not in row


def test_without_augmentation_images_and_masks_are_those_of_the_files(voc, tmp_path, steps):
    folder = train(voc, tmp_path, '--no-aug', '--img-size', 96, '--save-images', '--log-interval', 1)
    images = {path.stem: np.array(Image.open(path)) for path in (voc / 'JPEGImages').glob('train*')}
    masks = {stem: np.array(Image.open(voc / 'SegmentationClass' / f'{stem}.png')) for stem in images}
    found = []
    for inputs, targets, *_ in steps:
        for input, target in zip(inputs, targets, strict=True):
            pixels = ((input * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
            (stem,) = [stem for stem in images if np.array_equal(images[stem], pixels)]
            assert np.array_equal(masks[stem], target.numpy())
            found.append(stem)
    assert sorted(found) == sorted(images)
    pictures = {path.name: Image.open(path).size for path in folder.glob('*.jpg')}
    assert pictures == {f'train-batch-{number}.jpg': (4 * 96, 96) for number in (0, 1)}


def test_augmented_images_keep_their_masks(tmp_path, steps):
    data = write_odd(tmp_path / 'data', 'pair')
    flags = ['--scale', 0.2, 0.6, '--vflip', 1, '--color-jitter', 0, '--train-interpolation', 'nearest']
    train(data, tmp_path, *flags, '-b', 9, '--num-classes', 3)
    ((inputs, targets, *_),) = steps
    assert inputs.shape == (9, 3, SIZE, SIZE)
    pixels = ((inputs * 0.5 + 0.5) * 255).round().long().permute(0, 2, 3, 1)
    counted = targets != 255
    assert torch.equal(pixels[counted], targets[counted][:, None] * 80 + torch.tensor([20, 40, 60]))
    # a class lies below the next one in the files, and above it after the flip; crops leave out most of the border
    lowest = targets.masked_fill(~counted, -1).amax(2)
    assert all(row[row >= 0].diff().le(0).all() for row in lowest)
    assert {tuple(target.unique().tolist()) for target in targets} - {(0, 1, 2, 255)}


def test_the_backbone_is_left_alone_while_it_is_frozen(voc, tmp_path):
    torch.manual_seed(5)
    backbone = timm.create_model('test_resnet')
    torch.save(backbone.state_dict(), tmp_path / 'backbone.pth')
    flags = ['--coretune', '--epochs', 2, '--freeze-epochs', 1, '--pretrained-path', tmp_path / 'backbone.pth']
    folder = train(voc, tmp_path, *flags)
    first, second = (
        torch.load(folder / f'checkpoint-{epoch}.pth.tar', weights_only=False)['state_dict'] for epoch in (0, 1)
    )
    kept = {f'backbone.{key}': value for key, value in backbone.state_dict().items() if not key.startswith('fc.')}
    assert kept.keys() == {key for key in first if key.startswith('backbone.')}
    assert all(torch.equal(first[key], value) for key, value in kept.items())
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    assert {'backbone.conv1.0.weight', 'backbone.bn1.running_mean', 'classifier.weight'} <= moved
    assert any(key.startswith('decoder.') for key in moved)


def test_half_of_the_images_are_trained_on(voc, tmp_path, messages, steps):
    train(voc, tmp_path, '--label-fraction', 0.5)
    assert 'Training: 4 images, 11 classes' in messages()
    assert 'Validation: 3 images, 11 classes' in messages()
    assert len(steps) == 1


def test_without_validation_there_is_no_picture_and_the_loss_decides(voc, tmp_path):
    folder = train(voc, tmp_path, '--val-split', '', '--coretune')
    missing = {'confusion.csv', 'confusion.png', 'per_class.csv', 'segmentation.png'}
    assert {path.name for path in folder.iterdir()} - {'.lock'} == FILES - missing
    assert not any(name.startswith('eval_') for name in last_row(folder))
    assert timm_coretune.load_segmentation_model(folder).class_names[0] == 'background'


def test_mixed_precision_trains_close_to_single(voc, tmp_path, messages, tuned):
    folder = train(voc, tmp_path, '--coretune', '--amp', '--amp-dtype', 'bfloat16')
    assert 'Training with 1 process(es) on cpu, mixed precision: bf16.' in messages()
    row, single = last_row(folder), last_row(tuned)
    assert row['train_loss'] == pytest.approx(single['train_loss'], rel=0.05)
    assert row['train_loss'] != single['train_loss']


def test_the_head_has_a_learning_rate_of_its_own(voc, tmp_path, messages):
    folder = train(voc, tmp_path, '--coretune', '--head-lr-scale', 10)
    model = timm_coretune.load_segmentation_model(folder)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    state = torch.load(folder / 'last.pth.tar', weights_only=False)['task_state']['projector']
    head = sum(p.numel() for part in (model.decoder, model.classifier) for p in part.parameters())
    head += sum(value.numel() for value in state.values())
    lines = [line for line in messages() if line.startswith('LR of ')]
    assert [line.partition(': ')[0] for line in lines] == [
        f'LR of {head:,} parameters',
        f'LR of {backbone:,} parameters',
    ]
    assert [line.partition(': ')[2].partition(',')[0] for line in lines] == ['0.5', '0.05']


def test_rates_fall_from_layer_to_layer_of_a_transformer(voc, tmp_path):
    flags = ['--model', 'test_vit', '--model-kwargs', 'img_size=64', '--opt', 'adamw', '--layer-decay', 0.75]
    folder = train(voc, tmp_path, '--coretune', *flags, '--lr', 0.001)
    groups = torch.load(folder / 'last.pth.tar', weights_only=False)['optimizer']['param_groups']
    depth = len(timm.create_model('test_vit').blocks)
    scales = {round(group['lr_scale'], 6) for group in groups}
    # timm's own: the head, each block, and what is before them
    assert scales == {round(0.75**k, 6) for k in range(depth + 2)}
    assert json.loads((folder / 'segmentation.json').read_text())['reductions'] == [16]
