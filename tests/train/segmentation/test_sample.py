"""train.py --segmentation: on the sample and on folders, what it leaves, interruptions, processes, and flags"""

import csv
import json
import math
from functools import partial

import numpy as np
import pytest
import runs
import timm
import torch
import torch.nn as nn
from commands import environment_with, in_two_processes, run_command
from paths import HELPERS, ROOT, SAMPLE
from PIL import Image
from runs import SMALL, rows_of, stop_at
from safetensors.torch import load_file
from segmentation_train_worker import stay_in_eval
from sklearn.metrics import confusion_matrix

import timm_coretune
from timm_coretune.segmentation import predict_image
from timm_coretune.segmentation.__main__ import run as run_segmentation
from timm_coretune.segmentation.data.scenes import FashionScenes, write_voc
from timm_coretune.train import Trainer

FIGURES = ('loss', 'pa', 'mpa', 'miou', 'fwiou')
SIZE = 64
FLAGS = (
    *(*SMALL, '--segmentation', '--model-kwargs', 'output_stride=8', '--img-size', str(SIZE), '-b', '4'),
    *('--epochs', '1', '--device', 'cpu'),
)
FILES = {
    *('args.yaml', 'checkpoint-0.pth.tar', 'confusion.csv', 'confusion.png', 'curves.png', 'last.pth.tar'),
    *('model_best.pth.tar', 'model_best.safetensors', 'per_class.csv', 'segmentation.json', 'segmentation.png'),
    'summary.csv',
}


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    """8 scenes to train on and 3 to validate on, in the layout of VOC."""
    folder = tmp_path_factory.mktemp('voc')
    write_voc(FashionScenes(SAMPLE, 'train', 8), str(folder), 'train')
    write_voc(FashionScenes(SAMPLE, 'validation', 3), str(folder), 'val')
    return folder


train = partial(runs.train, base=FLAGS)


@pytest.fixture(scope='module')
def tuned(voc, tmp_path_factory):
    """The folder of a Core-tuning of one epoch."""
    return train(voc, tmp_path_factory.mktemp('tuned'), '--coretune')


def last_row(folder):
    return {name: float(value) for name, value in rows_of(folder / 'summary.csv')[-1].items()}


def read_counts(folder):
    """Pixels by true and predicted class, from confusion.csv."""
    with open(folder / 'confusion.csv', newline='') as f:
        return np.array([[int(n) for n in row[1:]] for row in list(csv.reader(f))[1:]])


def valid_pixels(data, split):
    """Pixels of every class in the masks of a split, made square of SIZE by the middle of what meets in a pixel."""
    counts = np.zeros(11, int)
    for stem in (data / 'ImageSets' / 'Segmentation' / f'{split}.txt').read_text().split():
        mask = np.array(Image.open(data / 'SegmentationClass' / f'{stem}.png'))
        place = ((np.arange(SIZE) + 0.5) * len(mask) / SIZE).astype(int)
        counts += np.bincount(mask[place][:, place].flatten(), minlength=256)[:11]
    return counts


@pytest.fixture
def steps(monkeypatch):
    """What the steps of a run are given, with the loss that plain PyTorch has for it before the step and theirs."""
    seen = []
    original = Trainer._step

    def step(self, input, target, *rest):
        model = self.task.get_eval_model()
        statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.random.fork_rng(), torch.no_grad():  # the same dropout again
            expected = nn.CrossEntropyLoss(ignore_index=255)(model(input), target).item()
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
        result = original(self, input, target, *rest)
        seen.append((input, target, expected, result['loss'].item()))
        return result

    monkeypatch.setattr(Trainer, '_step', step)
    return seen


# the sample


def figures_of(pixels, predicted, loss):
    """PA, MPA, mIoU and FWIoU in percent of true and predicted classes, by scikit-learn's counts."""
    counts = confusion_matrix(pixels, predicted, labels=range(11))
    share, recall, iou = {}, {}, {}
    for c in range(11):
        union = counts[c].sum() + counts[:, c].sum() - counts[c, c]
        if union:
            iou[c] = counts[c, c] / union
        if counts[c].sum():
            share[c], recall[c] = counts[c].sum() / len(pixels), counts[c, c] / counts[c].sum()
    return {
        'loss': loss,
        'pa': 100 * counts.trace() / len(pixels),
        'mpa': 100 * sum(recall.values()) / len(recall),
        'miou': 100 * sum(iou.values()) / len(iou),
        'fwiou': 100 * sum(share[c] * iou[c] for c in share),
    }


def test_the_bare_command_leaves_a_model_with_the_figures_of_scikit_learn(launch, tmp_path, read_csv):
    flags = ['--segmentation', '--coretune', '--epochs', '1', '--label-fraction', '0.1', '--experiment', 'run']
    finished = launch(['accelerate', 'launch', '--cpu', str(ROOT / 'train.py'), *flags])
    folder = tmp_path / 'output' / 'train' / 'run'
    assert {path.name for path in folder.iterdir()} - {'.lock'} == FILES
    (row,) = read_csv(folder / 'summary.csv')
    assert all(math.isfinite(float(row[f'train_{name}'])) for name in ('loss', 'task', 'contrast', 'dense'))
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith('Test: ')]
    for name, shown in zip(FIGURES, ('Loss', 'PA', 'MPA', 'mIoU', 'FWIoU'), strict=True):
        assert f'{shown}: {float(row[f"eval_{name}"]):>7.3f}' in line

    (words,) = [line for line in finished.stderr.splitlines() if line.startswith('Load them: ')]
    assert words == "Load them: timm_coretune.load_segmentation_model('./output/train/run')"
    model = timm_coretune.load_segmentation_model(folder)
    pixels, predicted, total = [], [], 0.0
    scenes = FashionScenes(SAMPLE, 'validation')
    for scene, mask in map(scenes.load, range(len(scenes))):  # as large as the images of the recipe
        image = torch.from_numpy(np.array(scene)).permute(2, 0, 1) / 255
        with torch.inference_mode():
            output = model((image[None] - 0.5) / 0.5)[0]
        counted = np.array(mask) != 255
        pixels.append(np.array(mask)[counted])
        predicted.append(output.argmax(0).numpy()[counted])
        log_p = output.double().log_softmax(0).flatten(1)[:, counted.flatten()]
        total -= log_p.gather(0, torch.from_numpy(pixels[-1]).long()[None]).sum().item()
    pixels, predicted = np.concatenate(pixels), np.concatenate(predicted)
    expected = figures_of(pixels, predicted, total / len(pixels))
    # the metric of a pixel at a tie may fall either way
    assert {name: float(row[f'eval_{name}']) for name in FIGURES} == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert len(set(predicted.tolist())) > 1


def test_the_figures_of_a_run_are_those_of_its_weights(voc, tuned, tmp_path):
    flags = ['--eval-only', '--initial-checkpoint', tuned / 'model_best.safetensors']
    (result,) = runs.results_of(voc, tmp_path, *flags, base=FLAGS)
    assert result['validation'] == pytest.approx({name: last_row(tuned)[f'eval_{name}'] for name in FIGURES}, rel=1e-6)
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_the_files_of_a_segmentation_and_none_of_an_image_model(voc, tuned, read_csv):
    assert {path.name for path in tuned.iterdir()} - {'.lock'} == FILES
    rows = read_csv(tuned / 'per_class.csv')
    assert [row['class'] for row in rows] == (voc / 'classes.txt').read_text().splitlines()
    assert [int(row['pixels']) for row in rows] == valid_pixels(voc, 'val').tolist()
    assert read_counts(tuned).sum(1).tolist() == valid_pixels(voc, 'val').tolist()
    config = json.loads((tuned / 'segmentation.json').read_text())
    assert (config['head'], config['img_size'], config['num_classes']) == ('deeplabv3', [SIZE, SIZE], 11)
    assert config['backbone']['model_args']['output_stride'] == 8
    width, height = Image.open(tuned / 'segmentation.png').size
    assert min(width, height) > 200


def test_masks_are_predicted_from_the_folder_of_a_run(voc, tuned, tmp_path):
    run_segmentation(['predict', str(tuned), str(voc / 'JPEGImages'), '--output', str(tmp_path), '--device', 'cpu'])
    model = timm_coretune.load_segmentation_model(tuned)
    images = sorted((voc / 'JPEGImages').iterdir())
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f'{path.stem}.png' for path in images]
    for path in images:
        mask = Image.open(tmp_path / f'{path.stem}.png')
        assert mask.mode == 'P'
        assert mask.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert np.array_equal(np.array(mask), predict_image(model, Image.open(path)).numpy())
        assert mask.size == Image.open(path).size


# folders

SIZES = [(50, 37), (81, 64), (33, 120), (64, 64), (20, 17), (97, 31), (65, 65), (128, 40), (41, 90), (70, 55)]
NAMES = ['sky', 'sea', 'sand']


def write_odd(folder, layout, first_class=0, borders_only=False):
    """Ten images of different sizes whose thirds have the classes in turn, with a border of 255."""
    images, masks = ('JPEGImages', 'SegmentationClass') if layout == 'voc' else ('images', 'masks')
    for name in (images, masks):
        (folder / name).mkdir(parents=True)
    for number, (width, height) in enumerate(SIZES):
        values = np.arange(height)[:, None] * 3 // height + np.zeros((1, width), int)
        image = (values * 80)[..., None] + np.array([20, 40, 60])
        mask = values + first_class
        mask[:2], mask[-2:], mask[:, :2], mask[:, -2:] = 255, 255, 255, 255
        if borders_only and number:
            mask[:] = 255
        Image.fromarray(image.astype(np.uint8)).save(folder / images / f'{number}.png')
        Image.fromarray(mask.astype(np.uint8)).save(folder / masks / f'{number}.png')
    if layout == 'voc':
        lists = folder / 'ImageSets' / 'Segmentation'
        lists.mkdir(parents=True)
        (lists / 'train.txt').write_text('\n'.join(map(str, range(1, 10))))
        (lists / 'val.txt').write_text('0\n')
    return folder


@pytest.mark.parametrize('layout', ['voc', 'pair'])
@pytest.mark.parametrize('given', ['classes.txt', '--class-map', 'shifted'])
def test_images_of_any_size_are_trained_on_under_the_names_of_their_classes(tmp_path, layout, given, read_csv):
    data = write_odd(tmp_path / 'data', layout, first_class=given == 'shifted')
    names = tmp_path / ('names.txt' if given == '--class-map' else 'data/classes.txt')
    names.write_text('\n'.join(NAMES) + '\n\n')
    flags = {'--class-map': ['--class-map', names], 'shifted': ['--reduce-zero-label']}.get(given, [])
    folder = train(data, tmp_path, '--coretune', *flags)
    rows = read_csv(folder / 'per_class.csv')
    assert [row['class'] for row in rows] == NAMES
    # the first image is validated on, 50 x 37 made 64 x 47
    mask = Image.open(next(data.glob('[mS]*/0.png'))).resize((64, 47), Image.Resampling.NEAREST)
    counts = np.bincount(np.array(mask).flatten(), minlength=256)[given == 'shifted' :][:3]
    assert [int(row['pixels']) for row in rows] == counts.tolist()
    assert all(math.isfinite(value) for value in last_row(folder).values())


def test_grey_images_are_trained_on_and_predicted_in_one_channel(tmp_path, steps):
    data = write_odd(tmp_path / 'data', 'pair')
    flags = ['--in-chans', 1, '--no-aug', '--num-classes', 3, '--interpolation', 'nearest']
    folder = train(data, tmp_path, *flags, '-b', 9)
    ((inputs, targets, *_),) = steps
    assert inputs.shape == (9, 1, SIZE, SIZE)
    colors = [Image.new('RGB', (1, 1), (20 + c, 40 + c, 60 + c)).convert('L').getpixel((0, 0)) for c in (0, 80, 160)]
    for c, color in enumerate(colors):
        of_class = inputs[:, 0][targets == c]
        assert torch.allclose(of_class, torch.tensor((color / 255 - 0.5) / 0.5))
    model = timm_coretune.load_segmentation_model(folder)
    assert predict_image(model, Image.open(data / 'images' / '1.png')).shape == (64, 81)
    assert (folder / 'segmentation.png').exists()


@pytest.mark.parametrize('flags', [['--coretune'], []], ids=['coretune', 'plain'])
def test_batches_without_a_pixel_that_counts_leave_no_trace(tmp_path, flags):
    data = write_odd(tmp_path / 'data', 'pair', borders_only=True)
    folder = train(data, tmp_path, *flags, '--num-classes', 3, '--model-kwargs', 'output_stride=16')
    assert last_row(folder)['train_loss'] == 0
    weights = load_file(folder / 'model_best.safetensors')
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize('workers', [0, 1])
def test_a_mask_with_a_value_out_of_range_stops_the_run_with_its_name(tmp_path, workers):
    data = write_odd(tmp_path / 'data', 'voc')
    (data / 'classes.txt').write_text('\n'.join(NAMES))
    mask = np.array(Image.open(data / 'SegmentationClass' / '4.png'))
    mask[5, 6] = 77
    Image.fromarray(mask).save(data / 'SegmentationClass' / '4.png')
    path = data / 'SegmentationClass' / '4.png'
    with pytest.raises(ValueError, match=f'Expected classes 0 to 2, or 255 .*, got the value 77 in {path}'):
        train(data, tmp_path, '-b', 9, '--coretune', '--workers', workers)


def test_a_mask_of_another_size_stops_the_run_with_its_name(tmp_path):
    data = write_odd(tmp_path / 'data', 'pair')
    path = data / 'masks' / '3.png'
    Image.open(path).resize((64, 63)).save(path)
    with pytest.raises(ValueError, match=f'a mask of 64 x 64 pixels, as its image has, got 64 x 63 in {path}'):
        train(data, tmp_path, '-b', 9, '--coretune')


# flags


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


# interruptions

LONG = (
    *('--coretune', '--model-ema', '--model-ema-decay', '0.7', '-b', '2', '--epochs', '2', '--color-jitter', '0.3'),
    *('--recovery-interval', '1', '--sched-on-updates'),
)


@pytest.fixture(scope='module')
def straight(voc, tmp_path_factory):
    return train(voc, tmp_path_factory.mktemp('straight'), *LONG)


def test_a_run_interrupted_in_an_epoch_ends_with_the_bits_of_one_that_was_not(voc, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as context:
        stop_at(context, '_step', 6)  # two updates into the second epoch
        folder = train(voc, tmp_path, *LONG, '--workers', 1)
    assert (folder / 'recovery-1-1.pth.tar').exists()
    assert (folder / 'summary.csv').read_bytes() != (straight / 'summary.csv').read_bytes()
    assert train(voc, tmp_path, *LONG, '--workers', 1, '--resume', 'auto') == folder
    for name in ('summary.csv', 'model_best.safetensors', 'confusion.csv', 'per_class.csv', 'segmentation.json'):
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name
    a, b = (torch.load(path / 'last.pth.tar', weights_only=False) for path in (folder, straight))
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(a[key][name], b[key][name]) for name in b[key])
    assert not list(folder.glob('recovery-*'))


# processes


def test_two_processes_train_as_one_with_twice_the_batch_and_count_every_image_once(voc, tmp_path, monkeypatch):
    flags = ['--data-dir', voc, *FLAGS, '--coretune', '--epochs', 2, '--output', tmp_path]
    words = in_two_processes(HELPERS / 'segmentation_train_worker.py', *flags, '--experiment', 'two', '-b', 2)
    finished = run_command(words, environment_with(PYTHONPATH=str(ROOT)))
    assert 'Training with 2 process(es) on cpu' in finished.stderr
    for kind in (nn.BatchNorm2d, nn.Dropout):
        monkeypatch.setattr(kind, 'train', stay_in_eval)
    one = train(voc, tmp_path, '--coretune', '--epochs', 2)
    two = tmp_path / 'two'
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    # float32 sums in another order; a pixel at a tie may fall either way
    losses = ['train_loss', 'train_task', 'train_contrast', 'train_dense', 'eval_loss']
    assert [last_row(two)[name] for name in losses] == pytest.approx([last_row(one)[name] for name in losses], rel=1e-4)
    assert last_row(two)['eval_pa'] == pytest.approx(last_row(one)['eval_pa'], abs=0.1)
    assert read_counts(two).sum(1).tolist() == valid_pixels(voc, 'val').tolist()  # 3 images, one of them is repeated
