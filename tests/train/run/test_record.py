"""What a run shows while it trains: pictures of batches, and trackers"""

import pytest
from PIL import Image
from runs import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_a_tracker_that_is_not_installed_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])
    with pytest.raises(ValueError, match='--log-with wandb: not installed'):
        train(data, tmp_path, '--log-wandb')


# runs


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
