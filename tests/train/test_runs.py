"""train.py on the sample and on folders: arguments, data, results on disk, interruptions, errors"""

import argparse
import logging
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
from accelerate import Accelerator
from loader_options import skip_without_loader_option
from PIL import Image
from runs import SMALL
from safetensors.torch import save_file
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.task import ClassificationTask
from tiny_data import write_folders

from timm_coretune import CoreTuningTask
from timm_coretune.train import Trainer, main
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.batches import num_own_samples
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.data.safetensors_reader import ReaderSafetensors
from timm_coretune.train.loop import LoopConfig


@pytest.fixture
def tiny(tiny_images):
    """A data set of 3 classes whose images differ by color, 8 training and 4 validation images a class."""
    return tiny_images((8, 8, 8), (4, 4, 4), names=['red', 'green', 'blue'], noise=60, tint=180)


FLAGS = (*SMALL, '-b', '12', '--lr', '0.1', '--smoothing', '0', '--color-jitter', '0')
train = partial(runs.train, base=FLAGS)


# arguments


def test_defaults_fill_in_the_sample_and_its_checkpoint():
    parsed = parse_args([])
    assert parsed.args.model == 'test_resnet'
    assert os.path.isfile(parsed.args.data_dir)
    assert os.path.isfile(parsed.args.pretrained_path)
    assert '--data-dir DIR --model NAME --pretrained-path FILE' in parsed.assumed
    assert yaml.safe_load(parsed.text) == vars(parsed.args)


def test_flags_win_over_yaml_and_yaml_over_the_sample_recipe(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('lr: 0.3\nbatch_size: 7\n')
    args = parse_args(['-c', str(config), '-b', '9']).args
    assert (args.lr, args.batch_size, args.img_size) == (0.3, 9, 32)


def test_a_named_model_keeps_neither_the_sample_checkpoint_nor_a_size_it_cannot_take():
    args = parse_args(['--model', 'resnet50']).args
    assert (args.model, args.pretrained_path, args.img_size) == ('resnet50', None, 32)
    assert parse_args(['--model', 'vit_tiny_patch16_224']).args.img_size is None


def test_own_data_gets_the_defaults_of_timm(tmp_path):
    parsed = parse_args(['--data-dir', str(tmp_path)])
    assert parsed.assumed is None
    assert (parsed.args.model, parsed.args.epochs, parsed.args.batch_size) == ('resnet50', 300, 128)
    assert parse_args([str(tmp_path)]).args.data_dir == str(tmp_path)


@pytest.mark.parametrize(
    'text, message',
    [('no_such_key: 1\n', 'keys that are no options: no_such_key'), ('a: [\n', 'cannot read')],
    ids=['unknown-key', 'no-yaml'],
)
def test_a_config_that_is_none_is_refused(tmp_path, capsys, text, message):
    (tmp_path / 'config.yaml').write_text(text)
    with pytest.raises(SystemExit):
        parse_args(['-c', str(tmp_path / 'config.yaml')])
    assert message in capsys.readouterr().err


# data


def test_the_reader_hands_over_the_pixels_it_was_given(tiny):
    from safetensors.torch import load_file

    reader = ReaderSafetensors(str(tiny), 'train')
    file, label = reader[5]
    expected = load_file(tiny)
    assert torch.equal(torch.tensor(list(Image.open(file).tobytes())), expected['train.image'][5].flatten().long())
    assert label == expected['train.label'][5]
    assert reader.class_to_idx == {'red': 0, 'green': 1, 'blue': 2}


def test_grey_images_become_pgm(tmp_path):
    image = torch.arange(2 * 3 * 5, dtype=torch.uint8).reshape(2, 3, 5)
    save_file({'a.image': image, 'a.label': torch.tensor([0, 1])}, tmp_path / 'grey.safetensors')
    opened = Image.open(ReaderSafetensors(str(tmp_path / 'grey.safetensors'), 'a')[1][0])
    assert (opened.mode, opened.size) == ('L', (5, 3))
    assert list(opened.tobytes()) == image[1].flatten().tolist()


@pytest.mark.parametrize(
    'tensors, message',
    [
        ({'train.image': torch.zeros(2, 4, 4), 'train.label': torch.zeros(2).long()}, 'as uint8'),
        ({'train.image': torch.zeros(2, 4, 4).byte(), 'train.label': torch.zeros(2)}, 'as integers'),
        ({'train.image': torch.zeros(2, 4, 4).byte(), 'train.label': torch.zeros(3).long()}, r'integers \(2,\)'),
        ({'test.image': torch.zeros(2, 4, 4).byte(), 'test.label': torch.zeros(2).long()}, "has the splits .'test'."),
    ],
    ids=['float-images', 'float-labels', 'other-length', 'other-split'],
)
def test_a_safetensors_file_of_something_else_is_an_error(tmp_path, tensors, message):
    save_file(tensors, tmp_path / 'data.safetensors')
    with pytest.raises(ValueError, match=message):
        ReaderSafetensors(str(tmp_path / 'data.safetensors'), 'train')


def test_folders_of_images_are_counted_and_trained_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = write_folders(
        tmp_path / 'data', {f'{s}/{c}': 4 for s in ('train', 'validation') for c in ('ant', 'bee', 'cat')}
    )
    folder = train(data, tmp_path, '--coretune', '--epochs', 1)
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'model_best.safetensors'))
    assert model.fc.weight.isfinite().all()


def test_classes_that_differ_between_the_splits_are_named(tmp_path):
    counts = dict.fromkeys(('train/ant', 'train/bee', 'validation/ant', 'validation/cow'), 4)
    data = write_folders(tmp_path / 'data', counts)
    with pytest.raises(ValueError, match='in one only: bee, cow'):
        create_datasets(parse_args(['--data-dir', str(data)]).args)


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--data-dir', 'nowhere'], "--data-dir 'nowhere', which does not exist"),
        (['--data-dir', '.'], 'Expected images of the train split'),
        (['--pretrained-path', 'nowhere.pth'], "found none at 'nowhere.pth'"),
        (['--pretrained-path', 'notes.txt'], "could not read 'notes.txt'"),
        (['--resume', 'nowhere.pth'], "--resume 'nowhere.pth', found none"),
        (['-b', '5000'], 'Lower --batch-size'),
        (['--num-classes', '4'], 'at least the 10 classes of the data, got 4'),
        (['--coretune', '--contrast-temperature', '0'], 'temperature > 0'),
        (['--coretune', '--coretune-alpha', '-1'], 'mixup_alpha > 0'),
    ],
    ids=['no-folder', 'no-images', 'no-file', 'no-checkpoint', 'no-state', 'batch', 'classes', 'temperature', 'alpha'],
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
    datasets = create_datasets(parse_args(['--data-dir', str(tiny)]).args)
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


def test_gradients_of_accumulated_batches_are_averaged_with_a_short_last_group(tiny):
    args = parse_args(['--data-dir', str(tiny)]).args
    dataset = create_datasets(args).train
    batches = [
        (torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 2, 0]))
        for i in range(5)
    ]
    assert len(dataset) == 24
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=3, img_size=32)
    reference = timm.create_model('test_vit', num_classes=3, img_size=32)
    reference.load_state_dict(model.state_dict())

    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(task, optimizer, Accelerator(cpu=True), config=LoopConfig(grad_accum_steps=3)).train_one_epoch(0, batches)

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for group in (batches[:3], batches[3:]):
        loss = sum(torch.nn.functional.cross_entropy(reference(x), y) for x, y in group) / len(group)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('last', [33, 30, 29], ids=['in-a-batch', 'between-batches', 'a-batch-of-repetitions'])
def test_validation_counts_each_image_once(monkeypatch, last):
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(40, 8, generator=generator), torch.randint(8, (40,), generator=generator)
    task = ClassificationTask(torch.nn.Identity(), torch.nn.CrossEntropyLoss(), verbose=False)
    trainer = Trainer(task, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), Accelerator(cpu=True))
    # the images after those are what a distributed sampler repeats
    monkeypatch.setattr('timm_coretune.train.loop.num_own_samples', lambda loader, accelerator: last)
    metrics = trainer.validate([(output[part : part + 10], target[part : part + 10]) for part in range(0, 40, 10)])
    ranked = [sorted(range(8), key=lambda c: -row[c]) for row in output[:last].tolist()]
    labels = target[:last].tolist()
    assert metrics['top1'] == pytest.approx(100 * sum(r[0] == y for r, y in zip(ranked, labels, strict=True)) / last)
    top5 = 100 * sum(y in r[:5] for r, y in zip(ranked, labels, strict=True)) / last
    assert metrics['top5'] == pytest.approx(top5)
    expected = torch.nn.functional.cross_entropy(output[:last], target[:last]).item()
    assert metrics['loss'] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('num_images, num_processes', [(33, 2), (32, 2), (7, 3), (2, 4), (5, 1)])
def test_processes_share_the_images_of_a_validation_without_those_that_even_out(num_images, num_processes):
    dataset = torch.utils.data.TensorDataset(torch.arange(num_images))
    seen = []
    for rank in range(num_processes):
        accelerator = argparse.Namespace(num_processes=num_processes, process_index=rank)
        order = OrderedDistributedSampler(dataset, num_processes, rank) if num_processes > 1 else None
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=order)
        seen += torch.cat([batch for (batch,) in loader]).tolist()[: num_own_samples(loader, accelerator)]
    assert sorted(seen) == list(range(num_images))


def test_a_loss_that_is_not_finite_stops_training_with_its_step_and_the_last_finite_losses():
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])) for _ in range(6)]
    batches[3][0][0, 0, 0, 0] = float('nan')
    task = CoreTuningTask(timm.create_model('test_resnet', num_classes=2), verbose=False)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    trainer = Trainer(task, optimizer, Accelerator(cpu=True), config=LoopConfig(log_interval=100))
    with pytest.raises(ValueError, match=r'at update 4\. The last finite losses: loss \d.*task \d.*contrast \d'):
        trainer.train_one_epoch(0, batches)


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
    assert words[:2] == ['accelerate', 'launch']
    # the last of two flags wins
    main([*words[3:], '--epochs', str(epoch + 3)])
    epochs = [int(row['epoch']) for row in read_csv(tmp_path / 'run' / 'summary.csv')]
    assert epochs == list(range(epoch + 3))
