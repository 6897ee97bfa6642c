"""SIGTERM, SIGUSR1 and --time-limit: a state is saved, and the run that goes on ends as one that was not stopped"""

import os
import signal
import subprocess
import threading
import time
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import runs
import torch
from accelerate import Accelerator
from commands import ONE_THREAD, environment_with, in_two_processes, run_command
from kill_resume import fingerprint
from paths import ROOT
from runs import ON_CPU, outcome
from torch.utils.data import DataLoader, TensorDataset

from timm_coretune.evaluation.classification import ClassificationEvaluator
from timm_coretune.train import Trainer, classification, preemption
from timm_coretune.train.data.workers import outliving_signals
from timm_coretune.train.preemption import SIGNALS, Preempted, StopRequest
from timm_coretune.train.run.folder import find_newest_state, read_state

FLAGS = (*ON_CPU, '-b', '4', '--epochs', '2', '--coretune')
train = partial(runs.train, base=FLAGS)
WITH_EMA = (
    *('--model-ema', '--model-ema-decay', '0.7', '--sched', 'plateau', '--patience-epochs', '0', '-b', '2'),
    *('--grad-accum-steps', '4', '--opt', 'lookahead_adamw', '--lr', '0.003', '--drop', '0.1'),
)
ON_UPDATES = ('--sched-on-updates', '--warmup-epochs', '1', '-b', '2', '--grad-accum-steps', '4')


@pytest.fixture(scope='module')
def data(tiny_images):
    """12 training and 6 validation images of 3 classes."""
    return tiny_images((4, 4, 4), (2, 2, 2), names=['red', 'green', 'blue'], noise=120, tint=60)


@pytest.fixture(autouse=True)
def handlers():
    """No run leaves a handler behind."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def signal_in(context, owner, name, index, number=signal.SIGTERM):
    """Send this process a signal in the call of a function with that index. Returns a list with an item a call."""
    original, calls = getattr(owner, name), []

    def calling(*args, **kwargs):
        calls.append(0)
        if len(calls) == index + 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    context.setattr(owner, name, calling)
    return calls


def stopped(monkeypatch, data, output, flags, *where):
    """The folder of a run that a signal stopped, and the number of batches that it trained."""
    with monkeypatch.context() as context:
        steps = signal_in(context, Trainer, '_step', -1)
        signal_in(context, *where)
        with pytest.raises(SystemExit) as ended:
            train(data, output, *flags)
    assert ended.value.code == 143
    return output / 'run', len(steps)


# epochs have 3 batches of training and 2 of validation. Accumulation makes 6 and 3, in 2 updates, the last of 2 batches
@pytest.mark.parametrize(
    'flags, where, place, num_trained',
    [
        ((), (Trainer, '_step', 1), (0, 2, False), 2),
        pytest.param((), (Trainer, '_step', 3, signal.SIGUSR1), (1, 1, False), 4, marks=pytest.mark.slow),
        ((), (Trainer, '_step', 2), (0, 3, True), 3),  # the last update of an epoch
        pytest.param((), (ClassificationEvaluator, 'update', 0), (0, 3, True), 3, marks=pytest.mark.slow),
        ((), (ClassificationEvaluator, 'update', 2), (1, 3, True), 6),
        ((), (ClassificationEvaluator, 'update', 1), (1, 0, False), 3),  # the last batch: the epoch ends
        pytest.param(('--val-interval', '2'), (Trainer, '_step', 2), (1, 1, False), 4, marks=pytest.mark.slow),
        pytest.param(WITH_EMA, (Trainer, '_step', 1), (0, 4, False), 4, marks=pytest.mark.slow),
        pytest.param(WITH_EMA, (ClassificationEvaluator, 'update', 0), (0, 6, True), 6, marks=pytest.mark.slow),
        (WITH_EMA, (ClassificationEvaluator, 'update', 4), (0, 6, True), 6),
        (ON_UPDATES, (ClassificationEvaluator, 'update', 0), (0, 6, True), 6),
        (('-b', '2', '--contrast-batch-size', '4', '--drop', '0.1'), (Trainer, '_step', 1), (0, 4, False), 2),
    ],
)
def test_a_stopped_run_saves_its_place_and_ends_as_one_that_was_not(
    tmp_path, data, monkeypatch, straight, flags, where, place, num_trained
):
    expected = straight(*flags)
    folder, num_steps = stopped(monkeypatch, data, tmp_path, flags, *where)
    state = read_state(find_newest_state(str(folder)))['run_state']
    assert (state['epoch'], state['batch'], state['is_trained']) == place
    assert num_steps == num_trained
    with monkeypatch.context() as context:
        steps = signal_in(context, Trainer, '_step', -1)
        train(data, tmp_path, *flags, '--resume', 'auto')
    assert num_steps + len(steps) == (12 if '--grad-accum-steps' in flags else 6)  # no batch is trained twice
    assert outcome(folder) == outcome(expected)
    names = [sorted(path.name for path in run.iterdir() if path.suffix != '.png') for run in (folder, expected)]
    assert names[0] == names[1]


def test_the_command_that_continues_is_said(tmp_path, data, monkeypatch, messages):
    stopped(monkeypatch, data, tmp_path, (), Trainer, '_step', 0)
    (said,) = [message for message in messages() if message.startswith('Stopped by SIGTERM. Continue with:\n')]
    assert said.endswith('--resume auto')
    assert f'--output {tmp_path} --experiment run' in said


def test_a_state_of_the_end_of_training_goes_on_with_the_validation_in_other_batches(
    tmp_path, data, monkeypatch, straight, read_csv
):
    folder, _ = stopped(monkeypatch, data, tmp_path, (), ClassificationEvaluator, 'update', 0)
    train(data, tmp_path, '-b', '6', '--epochs', '2', '--resume', 'auto')
    rows = [read_csv(path / 'summary.csv')[0] for path in (folder, straight())]
    assert rows[0]['train_loss'] == rows[1]['train_loss']
    assert float(rows[0]['eval_loss']) == pytest.approx(float(rows[1]['eval_loss']))
    assert len(read_csv(folder / 'summary.csv')) == 2


def test_further_signals_while_a_state_is_saved_leave_it_whole(tmp_path, data, monkeypatch):
    original = torch.save

    def save(*args, **kwargs):
        for number in (*SIGNALS, *SIGNALS):
            os.kill(os.getpid(), number)
        original(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', save)
    folder, _ = stopped(monkeypatch, data, tmp_path, (), Trainer, '_step', 0)
    assert [path.name for path in folder.glob('*.tar')] == ['recovery-0-0.pth.tar']
    assert read_state(str(folder / 'recovery-0-0.pth.tar'))['run_state']['batch'] == 1


def test_a_signal_before_the_first_batch_leaves_nothing(tmp_path, data, monkeypatch, messages):
    signal_in(monkeypatch, classification, 'create_model', 0)
    with pytest.raises(SystemExit) as ended:
        train(data, tmp_path)
    assert ended.value.code == 143
    assert any(m.startswith('Stopped by SIGTERM before the first batch: nothing') for m in messages('WARNING'))
    assert not list(tmp_path.iterdir())


def test_a_validation_alone_is_left_at_once(tmp_path, data, monkeypatch):
    updates = signal_in(monkeypatch, ClassificationEvaluator, 'update', 0)
    with pytest.raises(SystemExit) as ended:
        train(data, tmp_path, '--eval-only')
    assert (ended.value.code, len(updates)) == (143, 1)


def test_a_signal_after_the_last_batch_does_not_stop_a_run_that_is_over(tmp_path, data, monkeypatch, straight):
    signal_in(monkeypatch, ClassificationEvaluator, 'update', 3)
    assert outcome(train(data, tmp_path)) == outcome(straight())


def test_a_time_limit_stops_a_run_as_a_signal_does(tmp_path, data, messages, straight):
    assert time.time() - psutil.Process().create_time() > 0.6  # this process is older than the limit
    with pytest.raises(SystemExit) as ended:
        train(data, tmp_path, '--time-limit', '0.01')
    assert ended.value.code == 143
    assert any(message.startswith('Stopped by --time-limit. Continue with:\n') for message in messages())
    assert (tmp_path / 'run' / 'recovery-0-0.pth.tar').exists()
    train(data, tmp_path, '--time-limit', '600', '--resume', 'auto')
    assert outcome(tmp_path / 'run') == outcome(straight())
    assert not [message for message in messages('WARNING') if 'other arguments' in message]


def test_a_time_limit_counts_from_the_start_of_the_process(monkeypatch):
    started = psutil.Process().create_time()
    now = time.time()
    stop = StopRequest(time_limit=(now - started + 60) / 60)  # a minute from now
    accelerator = Accelerator(cpu=True)
    clock = time.monotonic()
    for seconds, reason in ((50, ''), (70, '--time-limit')):
        monkeypatch.setattr(preemption.time, 'monotonic', lambda s=seconds: clock + s)
        assert stop.agree(accelerator) == reason


def test_signals_are_left_alone_in_other_threads_and_in_forked_processes():
    before, found = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        child = os.fork()
        if not child:
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                os._exit(3 if stop.reason else 0)
            finally:
                os._exit(4)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGUSR1)


def test_several_processes_agree_about_once_a_second(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(preemption.time, 'monotonic', lambda: clock.now)
    stop, other, gathers = StopRequest(), [0.0, 0.0], []

    def gather(own):
        gathers.append(clock.now)
        return torch.cat([own, torch.tensor([other])])

    accelerator = SimpleNamespace(num_processes=2, device='cpu', gather=gather)
    for _ in range(10_000):  # updates of 10 ms
        clock.now += 0.01
        assert stop.agree(accelerator) == ''
    assert 100 <= len(gathers) <= 110
    other[0] = 1 + SIGNALS.index(signal.SIGTERM)  # this process got no signal
    seen = [stop.agree(accelerator) for _ in range(100)]
    assert seen.count('SIGTERM') == 1
    other[0] = 0.0
    stop.start_phase()
    gathers.clear()
    for _ in range(5):  # slower than a second each
        clock.now += 3
        stop.agree(accelerator)
    assert len(gathers) == 5


def test_a_process_that_loads_data_outlives_sigterm_from_others_alone():
    images = TensorDataset(torch.arange(64))
    loader = outliving_signals(DataLoader(images, batch_size=1, num_workers=1))
    batches = iter(loader)
    assert next(batches)[0].item() == 0
    (worker,) = batches._workers
    for name in ('TERM', 'USR1'):
        subprocess.run(['kill', f'-{name}', str(worker.pid)], check=True)
    assert [int(batch) for (batch,) in batches] == list(range(1, 64))
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()  # as torch and Python do
    worker.join(10)
    assert not worker.is_alive()


RECIPE = (
    *('--coretune', '--model-ema', '--model-ema-decay', '0.9', '--epochs', '2', '--device', 'cpu', '-b', '16'),
    *('--label-fraction', '0.1', '--log-interval', '1', '-j', '1', '--reprob', '0.3'),
)
ENVIRONMENT = environment_with(**ONE_THREAD)


def command_of(output, name):
    return in_two_processes(ROOT / 'train.py', *RECIPE, '--output', str(output), '--experiment', name)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """What a run of two processes comes to that nobody stops."""
    output = tmp_path_factory.mktemp('whole')
    run_command(command_of(output, 'whole'), ENVIRONMENT)
    return fingerprint(str(output / 'whole'))


@pytest.mark.slow
def test_two_processes_of_which_one_is_told_to_stop_save_one_state_and_go_on_from_it(tmp_path, whole):
    words = command_of(tmp_path, 'run')
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log)
    while 'Train: 0 [   2/' not in (tmp_path / 'log').read_text():
        assert process.poll() is None, (tmp_path / 'log').read_text()
        time.sleep(0.02)
    psutil.Process(process.pid).children()[-1].send_signal(signal.SIGTERM)
    assert process.wait(60) == 1  # that of the launcher, whatever its processes end with
    said = (tmp_path / 'log').read_text()
    assert 'Stopped by SIGTERM. Continue with:\n' in said, said
    assert 'Add what accelerate launch was given' in said
    assert 'DataLoader worker' not in said
    assert len(list((tmp_path / 'run').glob('*.tar'))) == 1
    finished = run_command([*words, '--resume', 'auto'], ENVIRONMENT)
    assert 'Continuing' in finished.stderr
    assert fingerprint(str(tmp_path / 'run')) == whole
