"""Runs of train.py: they learn, repeat by seed, take the options of timm, and say what is wrong"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import runs
import timm
import torch
import yaml
from loading import skip_without_loader_option
from runs import SMALL

from timm_coretune.train import main
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import create_datasets

FLAGS = (*SMALL, '-b', '12', '--lr', '0.1', '--smoothing', '0', '--color-jitter', '0')

train = partial(runs.train, base=FLAGS)


# bad input


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--data-dir', 'nowhere'], "--data-dir 'nowhere', which does not exist"),
        (['--data-dir', '.'], 'Expected images in one folder per class'),
        (['--pretrained-path', 'nowhere.pth'], "found none at 'nowhere.pth'"),
        (['--pretrained-path', 'notes.txt'], "could not read 'notes.txt'"),
        (['--resume', 'nowhere.pth'], "--resume 'nowhere.pth', found none"),
        (['-b', '5000'], 'Lower --batch-size'),
        (['--num-classes', '4'], 'at least the 10 classes of the data, got 4'),
    ],
    ids=['no-folder', 'no-images', 'no-file', 'no-checkpoint', 'no-state', 'batch', 'classes'],
)
def test_bad_input_stops_the_run_with_the_likely_fix(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'notes.txt').write_text('no checkpoint')
    with pytest.raises(ValueError, match=message):
        train(None, tmp_path, *flags, base=())


# runs


def test_a_run_learns_and_leaves_plain_timm_weights(tmp_path, tiny, read_csv):
    folder = train(tiny, tmp_path, '--coretune', '--epochs', 8, '--lr', 0.02)
    rows = read_csv(folder / 'summary.csv')
    assert len(rows) == 8
    assert float(rows[-1]['train_task']) < float(rows[0]['train_task'])
    loss = float(rows[-1]['train_task']) + 0.1 * float(rows[-1]['train_contrast'])
    assert float(rows[-1]['train_loss']) == pytest.approx(loss, rel=1e-4)

    best = max(float(row['eval_top1']) for row in rows)
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'model_best.safetensors'))
    datasets = create_datasets(parse_args(['--data-dir', str(tiny)]).settings.data)
    loader = timm.data.create_loader(
        datasets.validation, (3, 32, 32), 12, use_prefetcher=False, num_workers=0, persistent_workers=False,
        mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=0.95,
    )  # fmt: skip
    correct = sum((model.eval()(x).argmax(1) == y).sum().item() for x, y in loader)
    assert 100 * correct / 12 == pytest.approx(best)
    assert os.stat(folder / 'model_best.safetensors').st_mode & 0o777 == 0o666 & ~_umask()
    assert yaml.safe_load((folder / 'args.yaml').read_text())['coretune'] is True


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_same_seed_gives_the_same_run(tmp_path, tiny, read_csv):
    runs = [train(tiny, tmp_path / name, '--coretune') for name in 'ab']
    a, b = (read_csv(folder / 'summary.csv') for folder in runs)
    assert a == b


def test_accumulated_batches_and_ema_and_mixup_and_compile_run_together(tmp_path, tiny, read_csv):
    folder = train(
        tiny, tmp_path, '--coretune', '-b', 6, '--grad-accum-steps', 3, '--model-ema',
        '--model-ema-decay', 0.5, '--mixup', 0.2, '--clip-grad', 1, '--sched-on-updates', '--torchcompile', 'eager',
        '--recovery-interval', 1, '--amp', '--amp-dtype', 'bfloat16',
    )  # fmt: skip
    assert len(read_csv(folder / 'summary.csv')) == 2
    assert not list(folder.glob('recovery-*.pth.tar'))  # the run is over
    timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'model_best.safetensors'))


NAFLEX = (
    *('--model', 'naflexvit_base_patch16_gap', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2'),
    *('--naflex-loader', '--naflex-train-seq-lens', '4', '9', '--naflex-max-seq-len', '4', '--mixup', '0.1'),
)


@pytest.mark.parametrize(
    'flags',
    [
        ('--jsd-loss', '--aug-splits', '3', '--split-bn', '--resplit', '--reprob', '0.5', '--aa', 'augmix-m5-w2'),
        ('--bce-loss', '--smoothing', '0.1', '--bce-target-thresh', '0.2', '--bce-sum'),
        ('--bce-loss', '--mixup', '0.2', '--no-prefetcher', '--mixup-off-epoch', '1'),
        ('--coretune', '--aug-splits', '2', '--aa', 'rand-m5'),
        ('--coretune', '--train-img-sizes', '32', '48', '--train-size-schedule', 'progressive'),
        ('--coretune', '--model-dtype', 'bfloat16', '--opt', 'adamw', '--layer-decay', '0.7', '--fast-norm'),
        ('--coretune', '--head-init-scale', '0.1', '--head-init-bias', '-1', '--gp', 'max', '--in-chans', '1'),
        ('--torchscript',),
        NAFLEX,
        ('--coretune', *NAFLEX),
    ],
    ids=['jsd', 'bce', 'bce-mixup', 'augmix', 'sizes', 'bfloat16', 'head', 'script', 'naflex', 'naflex-coretune'],
)
def test_the_options_of_timm_train_together_with_ours(tmp_path, tiny, flags, read_csv):
    skip_without_loader_option(flags)
    folder = train(tiny, tmp_path, *flags)
    rows = read_csv(folder / 'summary.csv')
    assert len(rows) == 2
    assert all(math.isfinite(float(row['train_loss'])) for row in rows)
    assert (folder / 'model_best.safetensors').stat().st_size > 0


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation_is_that_of_timm(tmp_path, tiny, kind, read_csv, monkeypatch):
    # a teacher's weights come from the Hub, this one is random
    create_model = timm.models.create_model
    monkeypatch.setattr(
        'timm.task.distillation.create_model',
        lambda *args, **kwargs: create_model(*args, **{**kwargs, 'pretrained': False}),
    )
    flags = ['--kd-model-name', 'test_efficientnet', '--kd-distill-type', kind, '--distill-loss-weight', '0.5']
    folder = train(tiny, tmp_path, *flags)
    (first, _) = read_csv(folder / 'summary.csv')
    assert {'train_loss', 'train_kd' if 'train_kd' in first else 'train_distill', 'train_task'} <= first.keys()


@pytest.mark.slow
def test_ctrl_c_leaves_a_whole_checkpoint_and_prints_the_command_that_continues(tmp_path, tiny, read_csv):
    flags = ['--data-dir', str(tiny), *FLAGS, '--coretune', '--output', str(tmp_path), '--experiment', 'run']
    command = [sys.executable, '-m', 'timm_coretune.train', *flags, '--epochs', '5000']
    # a shell that starts tests in the background has them ignore the signal, and what they start too
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / 'run' / 'last.pth.tar').exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    epoch = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)['epoch']
    words = shlex.split(log.split('Continue with:\n')[1].splitlines()[0])
    assert words[:4] == ['accelerate', 'launch', '-m', 'timm_coretune.train']
    # the last of two flags wins
    main([*words[4:], '--epochs', str(epoch + 3)])
    epochs = [int(row['epoch']) for row in read_csv(tmp_path / 'run' / 'summary.csv')]
    assert epochs == list(range(epoch + 3))
