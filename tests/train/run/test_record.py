"""What a run writes while it trains: states by their rank, pictures of batches, and trackers"""

import contextlib
import io
import json
import math
import re
import sqlite3

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from runs import train
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.task import ClassificationTask

from timm_coretune.train import Trainer
from timm_coretune.train.cli.settings import OutputSettings, SavedArguments, Settings
from timm_coretune.train.loop import Position
from timm_coretune.train.run.finish import print_results
from timm_coretune.train.run.record import RunRecord
from timm_coretune.train.run.resume import Continuation


def test_a_tracker_that_is_not_installed_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])
    with pytest.raises(ValueError, match='--log-with wandb: not installed'):
        train(data, tmp_path, '--log-wandb')


# runs


def test_batches_of_log_lines_are_written_as_pictures(data, tmp_path):
    train(data, tmp_path, '--save-images', '--log-interval', 2)
    pictures = {path.name: Image.open(path).size for path in (tmp_path / 'run').glob('*.jpg')}
    assert pictures == {f'train-batch-{number}.jpg': (8 * 32, 32) for number in (0, 2)}


WITH_TENSORBOARD = ('--coretune', '--log-with', 'tensorboard', '--wandb-project', 'p')


def events_of(folder):
    events = EventAccumulator(str(folder / 'p'))  # the hyperparameters lie in a folder in it
    events.Reload()
    return events


def test_a_tracker_gets_the_columns_of_the_summary_and_steps_within_an_epoch(data, tmp_path, read_csv, messages):
    flags = ['--metrics', 'ece,per-class', '--watch-features', 2, '--log-interval', 2, '--epochs', 3]
    train(data, tmp_path, *WITH_TENSORBOARD, *flags)
    start, *rows = read_csv(tmp_path / 'run' / 'summary.csv')
    events = events_of(tmp_path / 'run')
    steps = {f'step_{name}' for name in ('loss', 'task', 'contrast', 'lr')}
    assert set(events.Tags()['scalars']) == rows[0].keys() | {'train_data_share'} | steps
    assert all(0 < event.value < 1 for event in events.Scalars('train_data_share'))
    for name in rows[0]:
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(3 * (int(row['epoch']) + 1), float(row[name])) for row in rows if row[name]]
        if name.startswith('features_'):
            expected.insert(0, (0, float(start[name])))
        assert [step for step, _ in seen] == [step for step, _ in expected]
        assert [value for _, value in seen] == pytest.approx([value for _, value in expected], rel=1e-5)
    lines = [message for message in messages() if message.startswith('Train: ')]
    shown = [re.search(r'Loss: (\S+).*Contrast: (\S+).*LR: (\S+)', line).groups() for line in lines]
    for index, name in enumerate(('step_loss', 'step_contrast', 'step_lr')):  # of updates 0 and 2 of each epoch
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in seen] == [1, 3, 4, 6, 7, 9]
        assert [value for _, value in seen] == pytest.approx([float(values[index]) for values in shown], rel=0.01)


def picture_of(events, name):
    picture = events.Images(name)[-1]
    pixels = bytearray(Image.open(io.BytesIO(picture.encoded_image_string)).convert('RGB').tobytes())
    return picture.step, torch.frombuffer(pixels, dtype=torch.uint8).view(picture.height, picture.width, 3)


def test_a_tracker_gets_the_first_batch_and_the_worst_mistakes(tiny_images, tmp_path):
    data = tiny_images((8, 8, 8), (4, 4, 4), size=32, names=['red', 'green', 'blue'], noise=230, tint=20)
    flags = ['--epochs', 1, '--no-aug', '--crop-pct', 1, '--lr', 0, '--seed', 1]
    folder = train(data, tmp_path, *WITH_TENSORBOARD, *flags)
    events = events_of(folder)
    assert set(events.Tags()['images']) == {'images/batch', 'images/mistakes'}
    stored = load_file(data)
    step, shown = picture_of(events, 'images/batch')
    assert step == 1
    assert shown.shape == (3 * (128 + 14), 3 * 128, 3)  # 8 images of 32 pixels, four times as large, in 3 columns
    first = shown[:128:4, :128:4].int()
    assert min((first - image.int()).abs().max() for image in stored['train.image']) <= 1

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    images, labels = stored['validation.image'], stored['validation.label']
    with torch.no_grad():
        logits = model((images.permute(0, 3, 1, 2) / 255 - mean) / std)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction='none')
    wrong = logits.argmax(1) != labels
    order = losses.masked_fill(~wrong, -1).argsort(descending=True)[: int(wrong.sum())]
    assert len(order) > 3
    step, shown = picture_of(events, 'images/mistakes')
    assert step == 3
    num_columns = shown.shape[1] // 128
    for place, index in enumerate(order.tolist()):
        row, column = divmod(place, num_columns)
        cell = shown[row * 142 : row * 142 + 128 : 4, column * 128 : (column + 1) * 128 : 4].int()
        assert (cell - images[index].int()).abs().max() <= 1, place


def test_trackio_gets_numbers_and_pictures_without_a_network(tiny, tmp_path, monkeypatch, read_csv):
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    pytest.importorskip('trackio', reason='trackio is in the extra test-formats')
    folder = train(tiny, tmp_path, '--coretune', '--log-with', 'trackio', '--epochs', 1, '--log-interval', 2)
    (row,) = read_csv(folder / 'summary.csv')
    (path,) = (tmp_path / 'trackio').glob('*.db')
    with contextlib.closing(sqlite3.connect(path)) as base:
        logged = [(step, json.loads(text)) for step, text in base.execute('select step, metrics from metrics')]
        assert base.execute('select distinct run_name from metrics').fetchall() == [('run',)]
    assert [step for step, values in logged if 'step_loss' in values] == [1, 3]
    ((step, values),) = [entry for entry in logged if 'train_loss' in entry[1]]
    assert step == 3
    assert {name: values[name] for name in row} == pytest.approx({name: float(value) for name, value in row.items()})
    pictures = {name: value for _, values in logged for name, value in values.items() if name.startswith('images/')}
    assert {'images/batch'} <= set(pictures)
    shown = Image.open(tmp_path / 'trackio' / 'media' / pictures['images/batch']['file_path'])
    assert shown.size == (3 * 128, 3 * 142)


# ranks


def recorder(folder, eval_metric, history=2):
    task = ClassificationTask(torch.nn.Linear(1, 2), torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    saved = SavedArguments(**{**Settings().flat(), 'eval_metric': eval_metric})
    output = OutputSettings(checkpoint_hist=history)
    accelerator = Accelerator(cpu=True)
    record = RunRecord(str(folder), task, optimizer, accelerator, output, saved)
    trainer = Trainer(task, optimizer, accelerator, record=record)
    trainer.train_one_epoch(0, [(torch.rand(2, 1), torch.tensor([0, 1]))])
    return trainer, record


def save(trainer, record, epoch, score):
    trainer.position = Position(epoch + 1, metric=score)
    record.save_epoch(trainer, epoch, False, {'loss': 1.0}, {record.eval_metric: score})


@pytest.mark.parametrize('eval_metric, sign', [('top1', 1), ('loss', -1)])
def test_a_state_whose_score_is_not_a_number_is_the_worst(tmp_path, eval_metric, sign):
    trainer, record = recorder(tmp_path, eval_metric)
    for epoch, score in enumerate([math.nan, 3.0, math.nan, 5.0, 4.0, math.nan]):
        save(trainer, record, epoch, sign * score)
    kept = sorted(path.name for path in tmp_path.glob('checkpoint-*'))
    assert kept == ['checkpoint-3.pth.tar', 'checkpoint-4.pth.tar']
    assert torch.load(tmp_path / 'model_best.pth.tar', weights_only=False)['epoch'] == 3
    assert record.saver.best_epoch == 3


def test_a_score_that_is_not_a_number_is_the_worst_after_a_resume_too(tmp_path):
    trainer, record = recorder(tmp_path, 'top1', history=3)
    for epoch, score in enumerate([math.nan, 3.0]):
        save(trainer, record, epoch, score)
    trainer, record = recorder(tmp_path, 'top1', history=3)
    record.continue_from(Continuation(str(tmp_path / 'last.pth.tar'), epoch=2, best=(3.0, 1), saved_at=(2, 0)))
    assert [path.rsplit('-', 1)[1] for path, _ in record.saver.checkpoint_files] == ['1.pth.tar', '0.pth.tar']
    save(trainer, record, 2, 2.0)
    save(trainer, record, 3, 1.0)
    assert sorted(path.name[11] for path in tmp_path.glob('checkpoint-*')) == ['1', '2', '3']


def test_results_end_with_the_best_although_one_is_not_a_number(capsys):
    print_results([{'epoch': i, 'train': {'loss': loss}} for i, loss in enumerate([2.0, math.nan, 1.0, 3.0])], 'loss')
    printed = [line.split(':')[1].strip(' ,') for line in capsys.readouterr().out.splitlines() if 'epoch' in line]
    assert printed == ['1', '3', '0', '2']


def test_a_folder_that_cannot_be_written_before_there_is_a_state_is_started_anew(tmp_path):
    trainer, record = recorder(tmp_path / 'missing', 'top1')
    (tmp_path / 'missing').mkdir()
    (tmp_path / 'missing' / 'args.yaml').mkdir()
    with pytest.raises(OSError, match=r'There is no state yet\. Make room, then start anew\.$'):
        record.write_args('text')
