"""train.py over several processes, and killed ones: same losses, same bits, and nothing waits for ever"""

import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import timm
import torch
from commands import ONE_THREAD, environment_with, in_two_processes, run_command
from kill_resume import fingerprint, kill_all
from paths import HELPERS, ROOT

pytestmark = pytest.mark.slow

ENVIRONMENT = environment_with(**ONE_THREAD)
SMALL_VIT = (
    *('--coretune', '--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size', '32', '--lr', '0.005'),
    *('--device', 'cpu', '--log-interval', '100'),
)


def run(*words):
    return run_command(words, ENVIRONMENT).stderr


def losses(read_csv, folder):
    rows = read_csv(folder / 'summary.csv')
    return [[float(row[name]) for name in ('train_loss', 'train_task', 'train_contrast', 'eval_loss')] for row in rows]


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """A run of two processes, six updates of one batch each."""
    output = tmp_path_factory.mktemp('two')
    flags = (*SMALL_VIT, '--epochs', '6', '--label-fraction', '0.033', '--output', str(output))
    log = run(*in_two_processes(ROOT / 'train.py', *flags, '--experiment', 'two', '-b', '64'))
    assert 'Training with 2 process(es) on cpu' in log
    return output, flags


def test_an_accumulation_that_was_given_to_accelerate_is_refused_before_data_is_read(tmp_path):
    words = [sys.executable, ROOT / 'train.py', *SMALL_VIT, '--output', tmp_path]
    finished = run_command(words, {**ENVIRONMENT, 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS': '4'}, check=False)
    assert finished.returncode != 0
    assert 'gradient_accumulation_steps 4 in accelerate' in finished.stderr
    assert '--grad-accum-steps 4' in finished.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_train_as_one_with_twice_the_batch(two_processes, read_csv):
    output, flags = two_processes
    run(sys.executable, ROOT / 'train.py', *flags, '--experiment', 'one', '-b', '128')
    one, two = losses(read_csv, output / 'one'), losses(read_csv, output / 'two')
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # float32 sums in another order
    assert one[0] != pytest.approx(one[-1], rel=1e-3)


def test_fsdp2_trains_as_ddp_and_leaves_plain_weights(two_processes, read_csv):
    output, flags = two_processes
    worker = str(HELPERS / 'fsdp_worker.py')
    run(*in_two_processes(worker, *flags, '--experiment', 'sharded', '-b', '64'))
    assert losses(read_csv, output / 'sharded') == losses(read_csv, output / 'two')
    weights = [
        timm.create_model(
            'test_vit', num_classes=10, img_size=32, checkpoint_path=str(output / name / 'model_best.safetensors')
        ).state_dict()
        for name in ('sharded', 'two')
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    assert not list((output / 'sharded').glob('*.pth.tar'))  # no process has the state of all


def test_fsdp2_refuses_what_needs_whole_weights():
    worker = str(HELPERS / 'fsdp_worker.py')
    finished = run_command(in_two_processes(worker, *SMALL_VIT, '--model-ema'), ENVIRONMENT, check=False)
    assert finished.returncode != 0
    assert '--model-ema needs whole weights on every process' in finished.stderr


def test_a_process_that_runs_out_of_batches_first_ends_the_epoch_for_all():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    worker = str(HELPERS / 'uneven_worker.py')
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(batches), port],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, batches in enumerate((5, 3))
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out.split()[:2] for out, _ in outputs] == [['trained', '3']] * 2, outputs
    assert 'Another process ran out of batches after 3' in outputs[0][1]


RECIPE = (
    *('--coretune', '--model-ema', '--model-ema-decay', '0.9', '--epochs', '4', '--recovery-interval', '1'),
    *('--reprob', '0.3', '--mixup', '0.2', '--color-jitter', '0.2', '--drop', '0.1', '--device', 'cpu'),
    *('--label-fraction', '0.15', '--log-interval', '1000', '-b', '32'),
)


def wait_for_states(folder, process, count):
    deadline = time.monotonic() + 120
    while len(list(folder.glob('*.pth.tar'))) < count and time.monotonic() < deadline:
        assert process.poll() is None, 'the run ended before it was killed'
        time.sleep(0.005)


def test_two_processes_killed_three_times_end_with_the_bits_of_a_run_that_was_not(tmp_path):
    command = in_two_processes(str(ROOT / 'train.py'), *RECIPE, '--output', str(tmp_path))
    run(*command, '--experiment', 'whole', '-j', '0')
    broken = [*command, '--experiment', 'broken', '--resume', 'auto', '-j', '0']
    draws = random.Random(2)
    for count in (1, 2, 3):
        process = subprocess.Popen(broken, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_states(tmp_path / 'broken', process, count)
        time.sleep(draws.uniform(0, 0.3))
        assert process.poll() is None, 'the run ended before it was killed'
        kill_all(process)
    log = run(*broken)
    assert 'Continuing' in log
    assert fingerprint(str(tmp_path / 'broken')) == fingerprint(str(tmp_path / 'whole'))


def test_a_terminated_launcher_leaves_no_process_behind(tmp_path):
    words = [str(ROOT / 'train.py'), *RECIPE, '--epochs', '1000', '--output', str(tmp_path), '--experiment', 'run']
    process = subprocess.Popen(
        in_two_processes(*words), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_states(tmp_path / 'run', process, 1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=60)
    for one in alive:
        one.kill()
    assert started
    assert not alive


def test_an_optimizer_of_second_order_is_refused_in_two_processes_before_any_data_is_read():
    # there are no data: had they been looked for first, that would have been the error
    words = in_two_processes(ROOT / 'train.py', *SMALL_VIT, '--opt', 'adahessian', '--data-dir', '/nowhere')
    result = run_command(words, ENVIRONMENT, check=False)
    assert result.returncode
    assert '--opt adahessian needs the second derivative of the loss' in result.stderr
    assert 'Train in one, or use another optimizer' in result.stderr
