"""What a run does when it goes on from a state: the folder is repaired, and what does not fit is said"""

import argparse
import csv
import os
import subprocess
import sys
from functools import partial

import pytest
import runs
import torch
from commands import in_two_processes
from paths import ROOT, SAMPLE
from runs import ON_CPU, SMALL, copy_of, outcome, stop_at
from safetensors import safe_open
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

from timm_coretune.atomic import create_temporary
from timm_coretune.data.resumable import SeededDataset, make_resumable
from timm_coretune.train.data.batches import batches_from
from timm_coretune.train.run.folder import read_state, remove_unfinished, take_folder
from timm_coretune.train.run.place import _ORDER, place_in_epoch
from timm_coretune.train.run.resume import Continuation


@pytest.fixture(scope='module')
def data(tiny_images):
    """12 training and 6 validation images of 3 classes."""
    return tiny_images((4, 4, 4), (2, 2, 2), names=['red', 'green', 'blue'], noise=120, tint=60)


FLAGS = (*ON_CPU, '-b', '4', '--epochs', '3', '--coretune', '--eval-metric', 'loss')
train = partial(runs.train, base=FLAGS)


def noted_epoch(weights):
    with safe_open(weights, framework='pt') as f:
        return int(f.metadata()['epoch'])


def interrupted(monkeypatch, data, output, method, count, *flags):
    with monkeypatch.context() as context:
        stop_at(context, method, count)
        return train(data, output, *flags)


# the file that repeats a run


def test_the_saved_file_of_a_run_repeats_it_on_this_device(tmp_path, data):
    # no --device: the default is cuda, and the file must not ask for it
    folder = runs.train(data, tmp_path / 'first', '--coretune', '--epochs', 1, base=SMALL)
    again = runs.train(None, tmp_path / 'again', '-c', folder / 'args.yaml', base=())
    assert outcome(again) == outcome(folder)
    assert '# in this run: lr 0.05, eval_metric top1, num_classes 3, device ' in (folder / 'args.yaml').read_text()


# batches that change within an epoch


@pytest.fixture
def loaded(monkeypatch):
    """Indices of the training images in the order in which they are loaded, by epoch."""
    indices = {}
    original = SeededDataset.__getitem__

    def noting(self, item):
        indices.setdefault(item[0].epoch, []).append(int(item[1]))
        return original(self, item)

    monkeypatch.setattr(SeededDataset, '__getitem__', noting)
    return indices


def order_of(epoch):
    return torch.randperm(12, generator=torch.Generator().manual_seed(42 + epoch)).tolist()


@pytest.mark.parametrize(
    'num_batches, flags, left',
    [
        (4, ['-b', '4'], slice(8, 12)),
        (2, ['-b', '4'], slice(4, 12)),
        (3, ['-b', '2'], slice(6, 12)),  # as before
        (3, ['-b', '4'], None),  # the next image is in the middle of a batch
        (5, ['-b', '8'], None),  # an epoch has a single batch now
        (4, ['--grad-accum-steps', '2'], slice(8, 12)),
        (3, ['--grad-accum-steps', '2'], None),  # the next batch is the second of an update
        (4, ['-b', '4', '--grad-accum-steps', '2'], slice(8, 12)),
        (4, ['--contrast-batch-size', '4'], slice(8, 12)),
        (3, ['--contrast-batch-size', '4'], None),  # the next batch is the second of a contrast
        (2, ['-b', '4', '--class-balance'], None),  # another order
    ],
)
def test_an_epoch_goes_on_at_the_next_image_in_other_batches_or_starts_again_and_says_so(
    tmp_path, data, monkeypatch, messages, loaded, read_csv, num_batches, flags, left
):
    first = ('-b', 2, '--recovery-interval', 1, '--epochs', 2)
    interrupted(monkeypatch, data, tmp_path, '_step', num_batches, *first)
    assert loaded.pop(0)[: 2 * num_batches] == order_of(0)[: 2 * num_batches]
    folder = train(data, tmp_path, *first, *flags, '--resume', 'auto')
    said = 'epoch 0 is started again, so these images are seen once more' in ' '.join(messages('WARNING'))
    assert said == (left is None)
    whole = 8 if '8' in flags else 12
    if '--class-balance' not in flags:
        assert loaded[0] == order_of(0)[left or slice(whole)]
    assert [len(set(loaded[0])), len(set(loaded[1]))] == [whole if left is None else 12 - left.start, whole]
    assert [row['epoch'] for row in read_csv(folder / 'summary.csv')] == ['0', '1']


def test_a_run_goes_on_with_fewer_batches_in_a_contrast(tmp_path, data, monkeypatch, messages, loaded, read_csv):
    first = ('-b', 2, '--contrast-batch-size', 4, '--recovery-interval', 1, '--epochs', 1)
    interrupted(monkeypatch, data, tmp_path, '_step', 2, *first)
    loaded.pop(0)
    train(data, tmp_path, *first, '--contrast-batch-size', 2, '--resume', 'auto')
    assert loaded[0] == order_of(0)[8:]
    said = ' '.join(messages('WARNING'))
    assert 'updated every 2. Now they are 2 x 1, updated every 1: continuing with batch 4' in said


def state_of(batch, size, meters, accum=1):
    """The place of a state that so many processes saved."""
    processes = [{'meter': {'names': ['loss'], 'total': [total], 'num_steps': batch}} for total in meters]
    before = {'batch_size': size, 'grad_accum_steps': accum}
    return Continuation('x', 1, batch, loop_state={'batch': batch, 'processes': processes}, before=before)


def loaders_of(num_processes, size, num_images=24):
    dataset = TensorDataset(torch.arange(num_images))
    for rank in range(num_processes):
        order = RandomSampler(dataset)
        if num_processes > 1:
            order = DistributedSampler(dataset, num_processes, rank)
        loader = DataLoader(dataset, batch_sampler=BatchSampler(order, size, True))
        yield make_resumable(loader, 42, rank, num_processes)


@pytest.mark.parametrize('before, now', [((1, 4), (2, 4)), ((2, 2), (1, 8)), ((2, 4), (4, 1)), ((2, 4), (1, 8))])
def test_other_processes_go_on_with_the_images_that_are_left(before, now):
    num_batches = 16 // (before[0] * before[1])
    values = {'batch_size': now[1], 'grad_accum_steps': 1, **dict.fromkeys(_ORDER)}
    seen = [[int(i) for loader in loaders_of(*before) for (b,) in _first(loader, num_batches) for i in b]]
    left = []
    for loader in loaders_of(*now):
        meters = [5.0 * num_batches, 7.0 * num_batches][: before[0]]
        continuation = place_in_epoch(state_of(num_batches, before[1], meters), values, now[0], loader)
        left += [int(i) for (batch,) in batches_from(loader, 1, continuation.batch) for i in batch]
        own = continuation.loop_state['processes'][0]['meter']
        assert own['total'][0] / own['num_steps'] == (6.0 if before[0] == 2 else 5.0)  # the mean over all processes
        assert own['num_steps'] == continuation.batch == 16 // (now[0] * now[1])
    assert (len(seen[0]), len(left)) == (16, 8)
    assert sorted(seen[0] + left) == list(range(24))


NOT_OF_THE_ORDER = (
    'label_fraction',
    'class_balance',
    'aug_repeats',
    'train_img_sizes',
    'naflex_loader',
    'epoch_repeats',
)


def _first(loader, count):
    batches = batches_from(loader, 1)
    return [next(batches) for _ in range(count)]


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(tmp_path, monkeypatch, launch, read_csv):
    flags = ('--coretune', '--label-fraction', '0.1', '--epochs', '2', '-b', '40', '--recovery-interval', '1')
    folder = interrupted(monkeypatch, SAMPLE, tmp_path, '_step', 8, *flags)  # 320 of 400 images
    words = [*FLAGS, *flags, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    finished = launch(in_two_processes(ROOT / 'train.py', '--data-dir', SAMPLE, *map(str, words)))
    assert 'continuing with batch 4, the first of the images that are left' in finished.stderr.replace('\n', ' ')
    assert [row['epoch'] for row in read_csv(folder / 'summary.csv')] == ['0', '1']


# the summary


def test_a_score_that_is_asked_for_later_has_a_column_of_its_own(tmp_path, data, straight, read_csv):
    folder = copy_of(straight(), tmp_path)
    train(data, tmp_path, '--metrics', 'ece', '--resume', folder / 'checkpoint-0.pth.tar')
    rows, before = read_csv(folder / 'summary.csv'), read_csv(straight() / 'summary.csv')
    assert [row['eval_ece'] == '' for row in rows] == [True, False, False]
    assert [{k: v for k, v in row.items() if k != 'eval_ece'} for row in rows] == before
    train(data, tmp_path, '--metrics', 'ece', '--resume', folder / 'checkpoint-1.pth.tar')
    assert read_csv(folder / 'summary.csv') == rows
    train(data, tmp_path, '--resume', folder / 'checkpoint-1.pth.tar')
    assert [row['eval_ece'] == '' for row in read_csv(folder / 'summary.csv')] == [True, False, True]


@pytest.mark.parametrize('share', [None, 0.0, 0.3, 0.6, 0.97], ids=['gone', 'empty', 'cut-30%', 'cut-60%', 'cut-97%'])
def test_a_damaged_summary_is_written_again_from_the_state(tmp_path, data, straight, share):
    folder = copy_of(straight(), tmp_path)
    content = (folder / 'summary.csv').read_bytes()
    (folder / 'summary.csv').unlink()
    if share is not None:
        (folder / 'summary.csv').write_bytes(content[: int(share * len(content))])
    train(data, tmp_path, '--resume', 'auto')
    assert outcome(folder) == outcome(straight())


@pytest.mark.parametrize(
    'damage', [lambda text: text[: int(0.9 * len(text))], lambda text: text + b'\0\xff\n', lambda text: text + b'1,2\n']
)
def test_damaged_rows_of_an_older_run_are_left_out_and_counted(tmp_path, data, straight, messages, damage):
    folder = copy_of(straight(), tmp_path)
    for path in folder.glob('*.pth.tar'):
        state = torch.load(path, weights_only=False)
        del state['run_state']['rows']  # as earlier versions wrote them
        torch.save(state, path)
    (folder / 'summary.csv').write_bytes(damage((folder / 'summary.csv').read_bytes()))
    train(data, tmp_path, '--resume', 'auto', '--epochs', 4)
    assert any('damaged' in message and 'summary.csv' in message for message in messages('WARNING'))
    with open(folder / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert rows[-1]['epoch'] == '3'
    assert all(None not in row and None not in row.values() for row in rows)


def test_what_a_kill_left_half_written_is_removed(tmp_path, data, straight, messages):
    folder = copy_of(straight(), tmp_path)
    for name in ('summary.csv.tmp', 'tmp.pth.tar', 'recovery_tmp.pth.tar', 'confusion.csv.tmp'):
        (folder / name).write_text('epoch,train_loss\n0,')
    random = os.path.basename(create_temporary(folder / 'summary.csv'))
    train(data, tmp_path, '--resume', folder / 'checkpoint-0.pth.tar')
    assert not [path.name for path in folder.iterdir() if 'tmp' in path.name]
    assert outcome(folder) == outcome(straight())
    removed = [message for message in messages() if 'half written' in message]
    assert removed == [
        f'Removed what a stopped run left half written: confusion.csv.tmp, recovery_tmp.pth.tar, {random}, '
        'summary.csv.tmp, tmp.pth.tar.'
    ]


def test_only_what_a_run_left_half_written_is_removed(tmp_path):
    left = [create_temporary(tmp_path / name) for name in ('args.yaml', 'checkpoint-3.pth.tar', 'x' * 255)]
    left += [tmp_path / name for name in ('tmp.pth.tar', 'recovery_tmp.pth.tar', 'checkpoint-3.pth.tar.tmp')]
    own = {'mine.tmp', 'mine.0123.tmp', 'mine.0123456789abcdef.tmp.txt', '0123456789abcdef.tmp', 'summary.csv'}
    for name in (*own, *left):
        (tmp_path / name).write_text('text')
    folders = {'folder.tmp', 'folder.0123456789abcdef.tmp'}
    for name in folders:
        (tmp_path / name).mkdir()
    assert remove_unfinished(str(tmp_path)) == sorted(os.path.basename(path) for path in left)
    assert set(os.listdir(tmp_path)) == own | folders


# going back


def test_later_states_are_set_aside_when_a_run_goes_back(tmp_path, data, monkeypatch, straight, messages, read_csv):
    folder = copy_of(straight(), tmp_path)
    assert noted_epoch(folder / 'model_best.safetensors') > 0
    interrupted(monkeypatch, data, tmp_path, '_step', 1, '--resume', folder / 'checkpoint-0.pth.tar')
    assert noted_epoch(folder / 'model_best.safetensors') == 0
    assert read_state(str(folder / 'model_best.pth.tar'))['epoch'] == 0
    aside = {path.name for path in (folder / 'set_aside').iterdir()}
    assert aside >= {'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar', 'last.pth.tar', 'summary.csv'}
    assert 'checkpoint-0.pth.tar' not in aside
    assert len(read_csv(folder / 'set_aside' / 'summary.csv')) == 3
    assert any('--resume auto does not return to it' in message for message in messages('WARNING'))
    train(data, tmp_path, '--resume', 'auto')
    assert any('checkpoint-0.pth.tar' in message and 'with epoch 1' in message for message in messages())
    assert outcome(folder) == outcome(straight())
    train(data, tmp_path, '--resume', folder / 'checkpoint-0.pth.tar')
    assert (folder / 'set_aside-1' / 'last.pth.tar').exists()


# the best weights


def flipped(content):
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


@pytest.mark.parametrize('ema', [[], ['--model-ema', '--model-ema-decay', '0.7']], ids=['plain', 'ema'])
@pytest.mark.parametrize('damage', [flipped, lambda c: c[: len(c) // 2], lambda c: b'', None])
def test_damaged_best_weights_are_written_again(tmp_path, data, straight, damage, ema, messages):
    folder = copy_of(straight(*ema), tmp_path)
    path = folder / 'model_best.safetensors'
    intact = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(intact))
    (folder / 'model_best.pth.tar').unlink()
    train(data, tmp_path, *ema, '--resume', 'auto')
    assert path.read_bytes() == intact
    assert read_state(str(folder / 'model_best.pth.tar'))['epoch'] == noted_epoch(path)
    assert any(f'Wrote {str(path)!r} again' in message for message in messages())


def test_intact_best_weights_are_left_alone(tmp_path, data, straight, messages):
    folder = copy_of(straight(), tmp_path)
    train(data, tmp_path, '--resume', 'auto')
    assert not [message for message in messages() if 'again' in message]
    assert outcome(folder) == outcome(straight())


def test_best_weights_that_nothing_holds_any_more_are_sought_anew(tmp_path, data, straight, messages):
    folder = copy_of(straight(), tmp_path)
    for path in (*folder.glob('checkpoint-*'), folder / 'model_best.safetensors'):
        path.unlink()
    os.link(folder / 'last.pth.tar', folder / 'recovery-2-9.pth.tar')
    state = torch.load(folder / 'last.pth.tar', weights_only=False)
    state['run_state']['best'] = [0.0, 1]  # no loss of a later epoch is lower
    torch.save(state, folder / 'recovery-2-9.pth.tar')
    (folder / 'last.pth.tar').unlink()
    train(data, tmp_path, '--resume', 'auto', '--epochs', 4)
    assert any('the best is sought anew from epoch 3 on' in message for message in messages('WARNING'))
    assert noted_epoch(folder / 'model_best.safetensors') == 3


def test_best_weights_come_along_from_another_folder(tmp_path, data, straight):
    best = noted_epoch(straight() / 'model_best.safetensors')
    folder = train(data, tmp_path, '--resume', straight() / 'last.pth.tar')
    assert (folder / 'model_best.safetensors').read_bytes() == (straight() / 'model_best.safetensors').read_bytes()
    assert read_state(str(folder / 'model_best.pth.tar'))['epoch'] == best


def test_another_score_has_another_best_epoch(tmp_path, data, straight, messages, read_csv):
    folder = copy_of(straight(), tmp_path)
    assert noted_epoch(folder / 'model_best.safetensors') == 2
    train(data, tmp_path, '--eval-metric', 'top5', '--resume', 'auto')  # 100 in every epoch, so the first is the best
    assert 'The best epoch was chosen by loss, now by top5: the best is now epoch 0.' in messages('WARNING')
    assert noted_epoch(folder / 'model_best.safetensors') == 0
    train(data, tmp_path, '--metrics', 'ece', '--eval-metric', 'ece', '--epochs', 4, '--resume', 'auto')
    assert 'The best epoch was chosen by loss, now by ece: no epoch has it.' in messages('WARNING')
    assert noted_epoch(folder / 'model_best.safetensors') == 3


# a run that is over


def test_a_run_that_is_over_says_so_in_one_sentence(tmp_path, data, straight, messages, capsys):
    folder = copy_of(straight(), tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert runs.results_of(data, tmp_path, '--resume', 'auto', '--lr', 1, base=FLAGS) == []
    said = [message for message in messages() if 'is over' in message]
    assert said == [
        'This run is over: all its 3 epochs are trained, so nothing is trained; ask for more --epochs to train on, or '
        'for another --experiment to start anew.'
    ]
    assert '--result' not in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_run_that_lost_its_patience_does_not_train_on_by_itself(tmp_path, data, messages, read_csv):
    flags = ('--eval-metric', 'top5', '--patience', '1', '--epochs', '6')  # 100 from the first epoch on
    folder = train(data, tmp_path, *flags)
    assert len(read_csv(folder / 'summary.csv')) == 2
    before = outcome(folder)
    for _ in range(2):
        train(data, tmp_path, *flags, '--resume', 'auto')
        assert outcome(folder) == before
    said = [message for message in messages() if 'is over' in message]
    assert len(said) == 2
    assert 'it stopped after 1 validations without a better top5' in said[0]
    assert 'a larger --patience' in said[0]
    train(data, tmp_path, *flags, '--patience', 2, '--resume', 'auto')
    assert len(read_csv(folder / 'summary.csv')) == 3


# what cannot be continued


@pytest.mark.parametrize(
    'flags, changes, obstacle',
    [
        (['--opt', 'adamw'], 'opt sgd -> adamw', 'the optimizer: the state is that of sgd, this run has adamw'),
        (['--model', 'test_efficientnet'], 'model test_resnet -> test_efficientnet', 'the weights: '),
        (['--projection-dim', '64'], 'projection_dim 256 -> 64', 'the loss: '),
        (['--contrast-weight', '0'], 'contrast_weight 0.1 -> 0.0', 'the loss: '),
        (['--head-lr-scale', '3'], 'head_lr_scale 1.0 -> 3.0', 'the optimizer: the state has'),
        (
            ['--model', 'test_efficientnet', '--opt', 'adamw', '--smoothing', '0.2'],
            'model test_resnet -> test_efficientnet, opt sgd -> adamw, smoothing 0.1 -> 0.2',
            'the weights: ',
        ),
    ],
)
def test_what_changed_is_said_before_what_cannot_be_continued(tmp_path, data, straight, flags, changes, obstacle):
    state = copy_of(straight(), tmp_path) / 'last.pth.tar'
    with pytest.raises(ValueError, match='Changed arguments') as error:
        train(data, tmp_path, *flags, '--resume', state)
    message = str(error.value)
    assert message.startswith(f'Cannot continue {str(state)!r}. Changed arguments: {changes}. What does not fit is ')
    assert obstacle in message.partition('What does not fit is ')[2]
    assert message.endswith(
        'or with a new optimizer (--no-resume-opt).'
        if obstacle.startswith('the optimizer')
        else 'or start a new run from its weights (--initial-checkpoint).'
    )


def test_plain_tuning_does_not_continue_core_tuning(tmp_path, data, straight):
    state = copy_of(straight(), tmp_path) / 'last.pth.tar'
    plain = [flag for flag in FLAGS if flag != '--coretune']
    with pytest.raises(ValueError, match='Changed arguments: coretune True -> False. What does not fit is the optim'):
        runs.train(data, tmp_path, '--resume', state, base=plain)


def test_another_optimizer_goes_on_with_the_weights_alone(tmp_path, data, straight, read_csv):
    folder = copy_of(straight(), tmp_path)
    train(data, tmp_path, '--opt', 'adamw', '--no-resume-opt', '--resume', folder / 'checkpoint-1.pth.tar')
    assert len(read_csv(folder / 'summary.csv')) == 3


def test_a_state_without_its_generator_goes_on(tmp_path, data, straight, read_csv):
    state = torch.load(straight() / 'checkpoint-1.pth.tar', weights_only=False)
    del state['task_state']['generator']
    (tmp_path / 'run').mkdir()
    torch.save(state, tmp_path / 'run' / 'last.pth.tar')
    folder = train(data, tmp_path, '--resume', 'auto')
    assert len(read_csv(folder / 'summary.csv')) == 3


def test_a_history_that_was_longer_is_left_alone(tmp_path, data, straight):
    folder = copy_of(straight(), tmp_path)
    train(data, tmp_path, '--checkpoint-hist', 1, '--resume', 'auto')
    assert len(list(folder.glob('checkpoint-*'))) == 3


def test_a_changed_momentum_is_used(tmp_path, data, straight):
    folder = copy_of(straight(), tmp_path)
    train(data, tmp_path, '--momentum', '0.5', '--resume', folder / 'checkpoint-1.pth.tar')
    groups = read_state(str(folder / 'last.pth.tar'))['optimizer']['param_groups']
    assert {group['momentum'] for group in groups} == {0.5}


# the lock of a killed run

LOCKS_AND_LOADS = """
import os, sys, time
from torch.utils.data import DataLoader
from timm_coretune.train.cli.settings import OutputSettings
from timm_coretune.train.run.folder import take_folder

class Slow:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        if index:
            time.sleep(600)
        return os.getpid()

folder, lock = take_folder(OutputSettings(output=sys.argv[1], experiment='run'), '', None)
batches = iter(DataLoader(Slow(), num_workers=1))
print(int(next(batches)), flush=True)
time.sleep(600)
"""


def test_a_loader_worker_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    command = [sys.executable, '-c', LOCKS_AND_LOADS, str(tmp_path)]
    settings = argparse.Namespace(root=str(tmp_path), experiment='run', resume='auto')
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(ROOT)}) as process:
        worker = int(process.stdout.readline())
        try:
            with pytest.raises(ValueError, match='Another run writes'):
                take_folder(settings, '', None)
            process.kill()
            process.wait()
            os.kill(worker, 0)  # it lives
            folder, lock = take_folder(settings, '', None)
            os.kill(worker, 0)
            lock.release()
        finally:
            os.kill(worker, 9)
    assert os.path.basename(folder) == 'run'
