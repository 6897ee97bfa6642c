"""What is measured and said: metrics beyond top-k, the first lines of the log, trackers, validation, early stopping"""

import csv
import math
import struct
import sys
from functools import partial

import pytest
import runs
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from runs import SMALL
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.task import ClassificationTask
from tiny_data import write_folders

from timm_coretune import CoreTuningTask
from timm_coretune.evaluation.classification import ClassificationEvaluator
from timm_coretune.report.plots import plot_confusion
from timm_coretune.train import Trainer
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import Datasets, create_datasets
from timm_coretune.train.loop import LoopConfig
from timm_coretune.train.optimization import create_optimizer, create_schedule
from timm_coretune.train.run.first_lines import log_contrast, log_data, log_optimization

NAMES = ['ant', 'bee', 'cat', 'dog', 'elk']


@pytest.fixture
def predictions():
    """Logits and labels of 90 images of 5 classes; no image is of the last, and none is taken for the second."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(4, (90,), generator=generator)
    output = 2 * torch.randn(90, 5, generator=generator)
    output[torch.arange(90), target] += 2
    output[:, 1] -= 100
    return output, target


def measure(names, predictions, class_names=NAMES):
    metrics = ClassificationEvaluator(None, names, 5, class_names)
    metrics.update(predictions[0][:7].flip(1), predictions[1][:7])
    metrics.reset()  # forgets them
    for part in (slice(0, 32), slice(32, 64), slice(64, 90)):
        metrics.update(predictions[0][part], predictions[1][part])
    scores = metrics.compute()
    return metrics, {name: scores[name] for name in scores if name not in ('loss', 'top1', 'top5')}


def test_confusion_and_scores_of_each_class_are_those_of_scikit_learn(predictions):
    output, target = predictions
    metrics, scalars = measure(['confusion', 'per-class'], predictions)
    predicted = output.argmax(1)
    assert metrics.matrix.tolist() == confusion_matrix(target, predicted, labels=range(5)).tolist()
    expected = precision_recall_fscore_support(target, predicted, labels=range(5), zero_division=0)
    rows = metrics.per_class()
    for key, values, scale in zip(('precision', 'recall', 'f1', 'support'), expected, (100, 100, 100, 1), strict=True):
        assert [row[key] for row in rows] == pytest.approx([scale * value for value in values])
    assert [row['class'] for row in rows] == NAMES
    present = sorted(set(target.tolist()))
    assert present == [0, 1, 2, 3]
    macro_f1 = 100 * f1_score(target, predicted, labels=present, average='macro', zero_division=0)
    assert scalars == {'macro_f1': pytest.approx(macro_f1)}


def ece_by_hand(output, target):
    bins = [[] for _ in range(15)]
    for row, label in zip(output.tolist(), target.tolist(), strict=True):
        exps = [math.exp(x - max(row)) for x in row]
        confidence = max(exps) / sum(exps)
        bins[min(int(15 * confidence), 14)].append((confidence, row.index(max(row)) == label))
    gaps = [abs(sum(c for c, _ in b) - sum(right for _, right in b)) for b in bins if b]
    return 100 * sum(gaps) / len(target)


def test_calibration_error_is_the_mean_gap_of_15_bins(predictions):
    _, scalars = measure(['ece'], predictions)
    assert scalars == {'ece': pytest.approx(ece_by_hand(*predictions), rel=1e-5)}
    assert scalars['ece'] > 1


def test_metrics_are_written_as_tables(tmp_path, predictions):
    metrics, _ = measure(['confusion', 'per-class', 'ece'], predictions, NAMES[:3])
    metrics.write(str(tmp_path))
    names = [*NAMES[:3], '3', '4']  # those that are not known are numbers
    header, *rows = csv.reader((tmp_path / 'confusion.csv').open())
    assert header == ['true / predicted', *names]
    assert [[name, *map(str, row)] for name, row in zip(names, metrics.matrix.tolist(), strict=True)] == rows
    rows = list(csv.DictReader((tmp_path / 'per_class.csv').open()))
    assert [row['class'] for row in rows] == names
    assert [float(row['recall']) for row in rows] == [row['recall'] for row in metrics.per_class()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['confusion.csv', 'per_class.csv']


def test_only_what_was_asked_for_is_measured_and_written(tmp_path, predictions):
    metrics, scalars = measure(['confusion'], predictions)
    metrics.write(str(tmp_path))
    assert scalars == {}
    assert [path.name for path in tmp_path.iterdir()] == ['confusion.csv']


def test_missing_torchmetrics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchmetrics.classification', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-coretune\[metrics\]'"):
        ClassificationEvaluator(None, ['ece'], 5, None)


def test_a_tracker_that_is_not_installed_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])
    with pytest.raises(ValueError, match='--log-with wandb: not installed'):
        train(data, tmp_path, '--log-wandb')


def test_a_confusion_matrix_becomes_a_picture(tmp_path, predictions):
    metrics, _ = measure(['confusion'], predictions)
    metrics.write(str(tmp_path))
    plot_confusion(str(tmp_path / 'confusion.csv'), str(tmp_path / 'confusion.png'))
    picture = Image.open(tmp_path / 'confusion.png')
    assert picture.format == 'PNG'
    assert min(picture.size) > 200
    assert len(set(picture.convert('L').tobytes())) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['confusion.csv', 'confusion.png']


# the first lines of the log


@pytest.fixture
def data(tiny_images):
    """24 training and 9 validation images: 12, 9, 2 and 1 of each class, and 3, 3, 2 and 1."""
    return tiny_images((12, 9, 2, 1), (3, 3, 2, 1), names=NAMES[:4])


FLAGS = (*SMALL, '-b', '8', '--device', 'cpu')
train = partial(runs.train, base=FLAGS)


def test_the_log_counts_images_and_classes(data, messages):
    log_data(create_datasets(parse_args(['--data-dir', str(data)]).args))
    assert messages() == [
        'Training: 24 images of 4 classes, 1 to 12 a class',
        'Validation: 9 images of 4 classes, 1 to 3 a class',
    ]


def test_the_log_admits_that_a_stream_has_no_counts(messages):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

        def __len__(self):
            return 100

    log_data(Datasets(Stream(), None, None, None))
    assert messages() == ['Training: 100 images, classes unknown before they are read']


@pytest.mark.parametrize(
    'flags, processes, gathered',
    [([], 1, 1), ([], 2, 2), (['--no-coretune-gather'], 2, 1), (['-b', '4'], 1, 1)],
    ids=['one', 'two', 'two-apart', 'small'],
)
def test_the_log_says_what_an_image_finds_in_the_contrasted_batch(data, messages, flags, processes, gathered):
    args = parse_args(['--data-dir', str(data), '-b', '8', *flags]).args
    log_contrast(args, create_datasets(args), processes)
    size = args.batch_size * gathered
    counts = (12, 9, 2, 1)
    positives = sum(n * (n - 1) for n in counts) / 24 * (size - 1) / 23
    alone = sum(n * math.comb(24 - n, size - 1) for n in counts) / 24 / math.comb(23, size - 1)
    (line,) = messages()
    assert line.startswith(f'Contrast over {size} images ({args.batch_size} x {gathered} process(es)')
    assert f'ln {size + 1} = {math.log(size + 1):.2f}.' in line
    assert f'{positives:.1f} positives on average, {100 * alone:.1f} % of the images find none' in line
    warned = messages('WARNING')
    assert len(warned) == (size < 8)
    if warned:
        assert f'A batch of {size} is less than twice the 4 classes' in warned[0]


def test_balanced_classes_leave_those_of_one_image_alone_and_need_no_warning(data, messages):
    args = parse_args(['--data-dir', str(data), '-b', '4', '--class-balance']).args
    log_contrast(args, create_datasets(args), 1)
    assert f'{100 / 24:.1f} % of the images have no other' in messages()[0]
    assert messages('WARNING') == []


def test_the_contrastive_loss_starts_where_the_log_says(messages, data):
    args = parse_args(['--data-dir', str(data), '-b', '32']).args
    log_contrast(args, create_datasets(args), 1)
    task = CoreTuningTask(timm.create_model('test_resnet', num_classes=4), verbose=False)
    # embeddings that are all alike are at chance
    for p in task.get_trainable_module().criterion.projector.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.ones_(list(task.get_trainable_module().criterion.projector.parameters())[-1])
    result = task(torch.rand(32, 3, 32, 32), torch.arange(32) % 4)
    focal = 1 - 1 / 33  # the weight of a positive that is predicted at chance
    assert f'ln 33 = {result["contrast_loss"].item() / focal:.2f}' in messages()[0]


def test_the_log_shows_the_first_middle_and_last_rate_of_every_group(messages):
    flags = ['--lr', '0.1', '--head-lr-scale', '10', '--epochs', '8', '--warmup-epochs', '0', '-b', '16']
    args = parse_args(['--data-dir', '.', *flags, '--grad-accum-steps', '3']).args
    model = timm.create_model('test_resnet', num_classes=4)
    model.conv1.requires_grad_(False)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer(args, task)
    scheduler, num_epochs = create_schedule(args, optimizer, 5)
    before = len(messages())
    log_optimization(args, task, optimizer, scheduler, num_epochs, 5, 2)
    lines = messages()[before:]
    assert lines[0] == 'An update: 16 images x 3 batch(es) x 2 process(es) = 96 images; 5 updates an epoch.'
    rates = [0.1 * (1 + math.cos(math.pi * t / 8)) / 2 for t in (0, 4, 7)]
    head = sum(p.numel() for p in model.fc.parameters())
    rest = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
    for count, scale in ((head, 10), (rest, 1)):
        shown = ', '.join(f'{scale * rate:.3g}' for rate in rates)
        assert f'LR of {count:,} parameters: {shown} (first, middle, last).' in lines
    stem = list(model.conv1.parameters())
    assert lines[-1] == f'Frozen: {sum(p.numel() for p in stem):,} parameters in {len(stem)} tensors.'
    assert len(lines) == 4


# runs


def test_validation_alone_repeats_the_metrics_of_the_epoch_it_loads(data, tmp_path, read_csv):
    flags = ['--coretune', '--epochs', 1, '--metrics', 'confusion,per-class,ece']
    (result,) = runs.results_of(data, tmp_path, *flags, base=FLAGS)
    folder = tmp_path / 'run'
    (row,) = read_csv(folder / 'summary.csv')
    assert {key: float(row[f'eval_{key}']) for key in result['validation']} == pytest.approx(result['validation'])
    assert set(result['validation']) == {'loss', 'top1', 'top5', 'macro_f1', 'ece'}
    assert sum(int(n) for r in csv.reader((folder / 'confusion.csv').open()) for n in r[1:] if n.isdigit()) == 9
    assert (folder / 'confusion.png').exists()
    files = sorted(tmp_path.rglob('*'))
    for flag in (['--eval-only'], ['--epochs', 0]):
        flags = [*flag, '--initial-checkpoint', folder / 'model_best.safetensors', '--metrics', 'per-class,ece']
        (again,) = runs.results_of(data, tmp_path, *flags, base=FLAGS)
        assert again['validation'] == pytest.approx(result['validation'], rel=1e-5)
    assert sorted(tmp_path.rglob('*')) == files


def test_validation_alone_takes_the_flags_of_a_training_run(data, tmp_path):
    train(
        data, tmp_path, '--eval-only', '--train-img-sizes', 32, 48, '--coretune', '--freeze-epochs', 1, '--mixup', 0.1
    )
    assert not (tmp_path / 'run').exists()


def test_without_validation_no_metrics_are_written(data, tmp_path):
    train(data, tmp_path, '--epochs', 1, '--val-split', '', '--metrics', 'confusion,per-class')
    assert (tmp_path / 'run' / 'model_best.safetensors').exists()
    assert not list((tmp_path / 'run').glob('con*.csv'))


def test_a_run_that_gets_no_better_stops(data, tmp_path, read_csv, messages):
    train(data, tmp_path, '--epochs', 9, '--patience', 2, '--lr', 1e-30)
    assert [row['epoch'] for row in read_csv(tmp_path / 'run' / 'summary.csv')] == ['0', '1', '2']
    assert 'No better top1 in 2 validations: stopping.' in messages()


@pytest.mark.parametrize(
    'metrics, val_interval, patience, stop',
    [
        ([1, 3, 2, 2, 9, 9], 1, 2, 4),
        ([1, 3, 2, 4, 4, 4, 9], 1, 2, 6),
        ([1, 2, 3, 4], 1, 1, 4),
        ([0, 5, 0, 4, 0, 4, 0, 9], 2, 2, 6),
    ],
    ids=['after-two', 'anew-after-a-better-one', 'always-better', 'every-other-epoch'],
)
def test_patience_counts_validations(monkeypatch, metrics, val_interval, patience, stop):
    task = ClassificationTask(torch.nn.Linear(1, 2), torch.nn.CrossEntropyLoss(), verbose=False)
    config = LoopConfig(patience=patience, val_interval=val_interval)
    trainer = Trainer(task, torch.optim.SGD(task.parameters(), 0.1), Accelerator(cpu=True), config=config)
    trained = []
    monkeypatch.setattr(trainer, 'train_one_epoch', lambda epoch, *_: trained.append(epoch) or {'loss': 0.0})
    monkeypatch.setattr(trainer, 'evaluate', lambda loader: {'top1': metrics[trained[-1]]})
    trainer.fit([], [], range(len(metrics)))
    assert len(trained) == stop


def test_neighbouring_outputs_are_averaged_in_validation():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(12, 6, generator=generator)
    target = torch.tensor([0, 1, 2, 3]).repeat_interleave(3)
    task = ClassificationTask(torch.nn.Identity(), torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    trainer = Trainer(task, optimizer, Accelerator(cpu=True), config=LoopConfig(tta=3))
    metrics = trainer.validate([(outputs[:6], target[:6]), (outputs[6:], target[6:])])
    means = [[sum(column) / 3 for column in zip(*rows, strict=True)] for rows in outputs.reshape(4, 3, 6).tolist()]
    losses = [math.log(sum(map(math.exp, row))) - row[label] for label, row in enumerate(means)]
    assert metrics['loss'] == pytest.approx(sum(losses) / 4, rel=1e-5)
    ranks = [sorted(range(6), key=lambda c, row=row: -row[c]).index(label) for label, row in enumerate(means)]
    assert metrics['top1'] == 25 * sum(rank == 0 for rank in ranks)
    assert metrics['top5'] == 25 * sum(rank < 5 for rank in ranks)


def test_batches_of_log_lines_are_written_as_pictures(data, tmp_path):
    train(data, tmp_path, '--save-images', '--log-interval', 2)
    pictures = {path.name: Image.open(path).size for path in (tmp_path / 'run').glob('*.jpg')}
    assert pictures == {f'train-batch-{number}.jpg': (8 * 32, 32) for number in (0, 2)}


def test_a_tracker_gets_the_columns_of_the_summary(data, tmp_path, read_csv):
    train(
        data, tmp_path, '--coretune', '--log-with', 'tensorboard', '--metrics', 'ece,per-class', '--wandb-project', 'p'
    )
    rows = read_csv(tmp_path / 'run' / 'summary.csv')
    events = EventAccumulator(str(tmp_path / 'run' / 'p'))  # the hyperparameters lie in a folder in it
    events.Reload()
    assert set(events.Tags()['scalars']) == rows[0].keys() - {'epoch'}
    for name in rows[0].keys() - {'epoch'}:
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in seen] == [int(row['epoch']) for row in rows]
        assert [value for _, value in seen] == pytest.approx([float(row[name]) for row in rows], rel=1e-5)


# data of other kinds


def write_idx(path, values):
    shape = struct.pack(f'>{values.ndim}I', *values.shape)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + shape + values.numpy().tobytes())


def test_a_data_set_of_torchvision_trains(tmp_path, messages, read_csv):
    raw = tmp_path / 'data' / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for split, count in (('train', 40), ('t10k', 20)):
        write_idx(raw / f'{split}-images-idx3-ubyte', torch.randint(256, (count, 28, 28)).byte())
        write_idx(raw / f'{split}-labels-idx1-ubyte', torch.arange(count).remainder(10).byte())
    flags = [
        '--dataset',
        'torch/fashion_mnist',
        '--coretune',
        '--class-balance',
        '--label-fraction',
        0.5,
        '--in-chans',
        1,
    ]
    train(tmp_path / 'data', tmp_path, *flags)
    assert 'Training: 20 images of 10 classes, 2 to 2 a class' in messages()
    assert len(read_csv(tmp_path / 'run' / 'summary.csv')) == 2
    assert timm.create_model(
        'test_resnet', num_classes=10, in_chans=1, checkpoint_path=str(tmp_path / 'run' / 'model_best.safetensors')
    )


def test_a_corrupt_image_is_passed_over_and_named(tmp_path, caplog, read_csv):
    write_folders(tmp_path / 'data', {f'{s}/{name}': 6 for s in ('train', 'validation') for name in 'ab'})
    corrupt = tmp_path / 'data' / 'train' / 'a' / '3.png'
    corrupt.write_bytes(corrupt.read_bytes()[:40])
    train(tmp_path / 'data', tmp_path, '-b', 4)
    assert len(read_csv(tmp_path / 'run' / 'summary.csv')) == 2
    warnings = [record.message for record in caplog.records if 'Skipped sample' in record.message]
    assert len(warnings) == 2  # once an epoch
    assert all(str(corrupt) in warning for warning in warnings)
