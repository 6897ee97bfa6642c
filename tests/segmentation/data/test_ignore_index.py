"""Any value may mark the pixels that are left out, and 255 is not taken for one where it is the foreground"""

import copy

import numpy as np
import pytest
import torch
from paths import SAMPLE
from PIL import Image
from segmentation_runs import last_row, train, write_odd

from timm_coretune.evaluation.segmentation import SegmentationEvaluator
from timm_coretune.segmentation import SegmentationTask
from timm_coretune.segmentation.data.dataset import create_dataset, open_dataset
from timm_coretune.segmentation.data.masks import IGNORE_INDEX
from timm_coretune.segmentation.data.scenes import FashionScenes
from timm_coretune.segmentation.data.transforms import create_eval_transform, create_train_transform
from timm_coretune.segmentation.model import create_segmentation_model
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.segmentation import open_datasets

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
INDICES = [0, 254, 255, -100, 65535]


class MasksInMemory:
    """A source of masks in memory, whose images are black."""

    class_names = None

    def __init__(self, masks):
        self.masks = [Image.fromarray(np.array(values, np.uint8)) for values in masks]

    def __len__(self):
        return len(self.masks)

    def load(self, index):
        return Image.new('RGB', self.masks[index].size), self.masks[index]

    def name(self, index):
        return f'mask {index}'


def write(root, masks, dtype=np.uint8, ending='png'):
    for kind in ('images', 'masks'):
        (root / kind).mkdir(parents=True)
    for number, values in enumerate(masks):
        values = np.array(values, dtype)
        noise = np.random.default_rng(number).integers(0, 256, (*values.shape, 3), np.uint8)
        Image.fromarray(noise).save(root / 'images' / f'{number}.png')
        Image.fromarray(values).save(root / 'masks' / f'{number}.{ending}')
    return str(root)


def pictures(marked_by):
    """Masks of 40 x 28 pixels of the classes 1 to 3, of which a fifth is left out."""
    draws = np.random.default_rng(0)
    found = []
    for _ in range(2):
        values = draws.integers(1, 4, (28, 40)).astype(np.int32)
        values[draws.random(values.shape) < 0.2] = marked_by
        found.append(values)
    return found


def results_with(root, ignore_index, transform):
    """Items, losses and scores of a model of fixed weights."""
    dataset = open_dataset('', root, 'train', num_classes=4, hold_out=False, ignore_index=ignore_index)
    dataset.transform = transform
    torch.manual_seed(3)
    images, targets = map(torch.stack, zip(dataset[0], dataset[1], strict=True))
    model = create_segmentation_model('test_resnet', 4, output_stride=8)
    task = SegmentationTask(
        model, anchors_per_image=9, ignore_index=ignore_index, generator=torch.Generator().manual_seed(0), verbose=False
    )
    model.train()
    output = copy.deepcopy(model)(images)
    losses = task(images, targets)
    evaluator = SegmentationEvaluator(4, ignore_index=ignore_index)
    evaluator.update(output, targets)
    scores = evaluator.compute()
    return images, targets, {name: loss.item() for name, loss in losses.items()}, dict(scores)


@pytest.mark.parametrize(
    'ignore_index, kind', [(0, 'train'), (0, 'eval'), (254, 'eval'), (-100, 'eval'), (65535, 'train')]
)
def test_every_value_gives_what_255_gives(tmp_path, ignore_index, kind):
    def transform(index):
        if kind == 'train':
            return create_train_transform((24, 24), MEAN, STD)
        return create_eval_transform((24, 32), MEAN, STD, ignore_index=index)

    dtype, ending = (np.int32, 'tif') if not 0 <= ignore_index <= 255 else (np.uint8, 'png')
    expected = results_with(write(tmp_path / 'a', pictures(255)), 255, transform(255))
    found = results_with(
        write(tmp_path / 'b', pictures(ignore_index), dtype, ending), ignore_index, transform(ignore_index)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].where(expected[1] != 255, ignore_index))
    assert (found[1] == ignore_index).any()
    assert found[2:] == expected[2:]


@pytest.mark.parametrize('ignore_index', INDICES)
def test_the_padding_is_ignored_whatever_the_value(ignore_index):
    transform = create_eval_transform((8, 16), MEAN, STD, ignore_index=ignore_index)
    source = MasksInMemory([[[1, 2], [3, 1]]])
    dataset = create_dataset(source, 4, ignore_index=ignore_index)
    dataset.transform = transform
    _, mask = dataset[0]
    assert mask.dtype == torch.int64
    assert mask[:, 8:].eq(ignore_index).all()
    assert mask[:, :8].gt(0).all()


@pytest.mark.parametrize('ignore_index', [0, 254, -100])
def test_what_a_source_marks_itself_stays_left_out(ignore_index):
    before = create_dataset(FashionScenes(SAMPLE, 'train', 1))[0][1].long()
    mask = create_dataset(FashionScenes(SAMPLE, 'train', 1), ignore_index=ignore_index)[0][1].long()
    assert (before == 255).any()
    assert torch.equal(mask, before.where(before != 255, ignore_index))


def test_another_value_is_not_left_out_silently(tmp_path):
    root = write(tmp_path, [[[0, 1, 255]]])
    with pytest.raises(ValueError, match=r'or 254 for pixels to leave out, got the value 255 in .*0\.png'):
        open_dataset('', root, 'train', num_classes=2, hold_out=False, ignore_index=254)[0]
    assert open_dataset('', root, 'train', num_classes=2, hold_out=False)[0][1].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize('ignore_index, expected', [(7, [7, 0, 1, 7]), (-100, [-100, 0, 1, 6]), (255, [255, 0, 1, 6])])
def test_zero_is_marked_by_the_chosen_value_and_other_classes_move_down(ignore_index, expected):
    options = dict(num_classes=7, reduce_zero_label=True, ignore_index=ignore_index)
    assert create_dataset(MasksInMemory([[[0, 1, 2, 7]]]), **options)[0][1].tolist() == [expected]
    with pytest.raises(ValueError, match='got the value [78] in'):  # not lowered to what is ignored
        create_dataset(MasksInMemory([[[0, 1, 2, 9 if ignore_index == 255 else 8]]]), **options)[0]
    with pytest.raises(ValueError, match='no class with reduce_zero_label'):
        create_dataset(MasksInMemory([[[0]]]), 7, reduce_zero_label=True, ignore_index=0)


def test_a_run_with_another_value_has_the_bytes_of_one_with_255(tmp_path):
    outcomes = []
    for value in (255, 0):
        data = write_odd(tmp_path / f'{value}', 'voc', first_class=1)
        for path in (data / 'SegmentationClass').iterdir():
            values = np.array(Image.open(path))
            values[values == 255] = value
            Image.fromarray(values).save(path)
        (data / 'classes.txt').write_text('sky\nsea\nsand\nsun\n')
        flags = ['--ignore-index', value] if value != 255 else []
        folder = train(data, tmp_path / f'run-{value}', '--coretune', *flags)
        names = ('summary.csv', 'model_best.safetensors', 'confusion.csv', 'per_class.csv', 'segmentation.json')
        outcomes.append({name: (folder / name).read_bytes() for name in names})
        assert last_row(folder)['train_loss'] > 0
    assert outcomes[0] == outcomes[1]


BINARY = [[[0, 255, 255]], [[0, 0, 255]]]


@pytest.mark.parametrize('given', [[], ['--num-classes', 2], ['--remap-masks'], ['--reduce-zero-label'], 'classes.txt'])
def test_masks_of_0_and_255_are_asked_about(tmp_path, given):
    root = write(tmp_path / 'data', BINARY)
    if given == 'classes.txt':
        (tmp_path / 'data' / 'classes.txt').write_text('ground\nroad\n')
        given = []
    words = ['--segmentation', '--data-dir', root, '--val-split=', *map(str, given)]
    with pytest.raises(
        ValueError, match=r'0 and 255 alone, such as in .*\.png.* Is 255 your foreground\? Then give --re'
    ):
        open_datasets(parse_args(words).settings)
    if not given:
        with pytest.raises(ValueError, match=r'Is 255 your foreground\?'):
            open_dataset('', root, 'train', hold_out=False)


@pytest.mark.parametrize(
    'flags, expected',
    [
        (['--remap-masks', '--ignore-index', '-100'], [[0, 1, 1], [0, 0, 1]]),
        (['--mask-colors', 'FILE'], [[0, 1, 1], [0, 0, 1]]),
        (['--mask-colors', 'index', '--num-classes', '2'], [[0, 255, 255], [0, 0, 255]]),
    ],
    ids=['values', 'colours', 'left-out'],
)
def test_what_the_question_offers_answers_it(tmp_path, flags, expected):
    root = write(tmp_path / 'data', BINARY)
    (tmp_path / 'colors.txt').write_text('0 0 0 ground\n255 255 255 road\n')
    flags = [str(tmp_path / 'colors.txt') if word == 'FILE' else word for word in flags]
    datasets = open_datasets(parse_args(['--segmentation', '--data-dir', root, '--val-split=', *flags]).settings)
    assert [mask.flatten().tolist() for _, mask in datasets.train] == expected
    assert datasets.num_classes == 2


def test_masks_are_read_up_to_the_first_with_another_value(tmp_path, monkeypatch):
    root = write(tmp_path, [[[0, 255]], [[0, 1]], [[0, 255]]])
    opened = []
    original = Image.Image.histogram
    monkeypatch.setattr(Image.Image, 'histogram', lambda self: opened.append(0) or original(self))
    assert open_dataset('', root, 'train', num_classes=2, hold_out=False).num_classes == 2
    assert len(opened) == 2


def test_one_class_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match='Expected at least 2 classes, got 1'):
        SegmentationEvaluator(1)
    assert IGNORE_INDEX == 255
