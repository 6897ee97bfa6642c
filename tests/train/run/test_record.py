"""What a run writes while it trains: states by their rank, pictures of batches, and trackers"""

import math

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from runs import train
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


def test_a_tracker_gets_the_columns_of_the_summary_and_the_share_of_waiting_for_data(data, tmp_path, read_csv):
    train(
        data, tmp_path, '--coretune', '--log-with', 'tensorboard', '--metrics', 'ece,per-class', '--wandb-project', 'p'
    )
    rows = read_csv(tmp_path / 'run' / 'summary.csv')
    events = EventAccumulator(str(tmp_path / 'run' / 'p'))  # the hyperparameters lie in a folder in it
    events.Reload()
    assert set(events.Tags()['scalars']) == rows[0].keys() - {'epoch'} | {'train_data_share'}
    assert all(0 < event.value < 1 for event in events.Scalars('train_data_share'))
    for name in rows[0].keys() - {'epoch'}:
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in seen] == [int(row['epoch']) for row in rows]
        assert [value for _, value in seen] == pytest.approx([float(row[name]) for row in rows], rel=1e-5)


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
