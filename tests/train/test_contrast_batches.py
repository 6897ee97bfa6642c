"""--contrast-batch-size: several batches of the loader are mined and contrasted as one"""

import pytest
import runs
import torch
from accelerate import Accelerator
from cached_steps import SCENARIOS, batch, make_task
from commands import ONE_THREAD, environment_with, in_two_processes
from paths import ROOT
from safetensors.torch import load_file
from timm.task import ClassificationTask
from torch.utils.data import DataLoader, TensorDataset

from timm_coretune.train import LoopConfig, Trainer, fine_tune
from timm_coretune.train.classification import log_contrast
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.settings import OptimizationSettings
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.processes import share_batch


@pytest.fixture(scope='module')
def data(tiny_images):
    """24 training and 6 validation images of 3 classes."""
    return tiny_images((8, 8, 8), (2, 2, 2), names=['red', 'green', 'blue'], noise=120, tint=60)


FLAGS = (
    *('--model', 'test_vit', '--img-size', '32', '--workers', '0', '--epochs', '2', '--warmup-epochs', '0'),
    *('--device', 'cpu', '--coretune', '--opt', 'sgd', '--weight-decay', '0'),
)


def optimizer_of(task):
    return torch.optim.SGD(task.trainable_module.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    'num_batches, accum, updates',
    [
        (4, 1, [[(0, 1, 1.0)], [(2, 3, 1.0)]]),
        (3, 1, [[(0, 1, 1.0)], [(2, 1.0)]]),
        (7, 2, [[(0, 1, 0.5), (2, 3, 0.5)], [(4, 5, 2 / 3), (6, 1 / 3)]]),
    ],
    ids=['whole', 'short', 'short-accumulated'],
)
def test_updates_are_those_of_big_batches(num_batches, accum, updates):
    batches = [batch(seed, num_images=6) for seed in range(num_batches)]
    task, reference = make_task(SCENARIOS['vit']), make_task(SCENARIOS['vit'])
    config = LoopConfig(contrast_batches=2, grad_accum_steps=accum)
    Trainer(task, optimizer_of(task), Accelerator(cpu=True), config=config).train_one_epoch(0, batches)
    optimizer = optimizer_of(reference)
    for contrasts in updates:
        for *indices, share in contrasts:
            images, target = (torch.cat([batches[i][part] for i in indices]) for part in (0, 1))
            (share * reference(images, target)['loss']).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = dict(reference.trainable_module.named_parameters())
    for name, p in task.trainable_module.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-11)


def test_batches_wait_where_the_loader_has_put_them():
    # as bytes here; on a GPU also in the memory of the host, if the loader leaves them there
    stored = [torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    target = batch(num_images=6)[1]
    found, waited = {}, []
    for name, images in (('stored', stored), ('floats', [x.double() for x in stored])):
        task = make_task(SCENARIOS['vit'])
        config = LoopConfig(contrast_batches=2, dtype=torch.float64)
        trainer = Trainer(task, optimizer_of(task), Accelerator(cpu=True), config=config)
        step = trainer.cached_step
        trainer.cached_step = lambda inputs, *rest, step=step: waited.append(inputs[0].dtype) or step(inputs, *rest)
        trainer.train_one_epoch(0, [(x, target) for x in images])
        found[name] = dict(task.trainable_module.named_parameters())
    assert waited == [torch.uint8, torch.float64]
    for name, p in found['stored'].items():
        assert torch.equal(p, found['floats'][name])


@pytest.mark.parametrize('further', [(), ('--grad-accum-steps', '2', '--clip-grad', '1', '--freeze-epochs', '1')])
def test_a_run_is_that_of_a_big_batch(tmp_path, data, further):
    found, expected = (
        load_file(runs.train(data, tmp_path / flags[1], *flags, *further, base=FLAGS) / 'model_best.safetensors')
        for flags in (('-b', '2', '--contrast-batch-size', '8'), ('-b', '8'))
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, data, launch):
    flags = ('--global-batch-size', '4', '--contrast-batch-size', '8', '--grad-accum-steps', '2', '--lr', '0.01')
    one = runs.train(data, tmp_path / 'one', *flags, base=FLAGS)
    words = ('--data-dir', data, '--output', tmp_path, '--experiment', 'two', *FLAGS, *flags)
    launch(in_two_processes(ROOT / 'train.py', *words), environment=environment_with(**ONE_THREAD))
    found, expected = (load_file(folder / 'model_best.safetensors') for folder in (tmp_path / 'two', one))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_fine_tune_contrasts_several_batches_of_a_loader():
    images, target = (torch.cat(parts) for parts in zip(*[batch(seed) for seed in range(4)], strict=True))
    models = []
    for batch_size, contrast_batches in ((4, 3), (12, 1)):
        task = make_task(SCENARIOS['vit'])
        fine_tune(
            task.trainable_module.model.float(),
            DataLoader(TensorDataset(images.float(), target), batch_size),
            accelerator=Accelerator(cpu=True),
            config=LoopConfig(contrast_batches=contrast_batches),
            optimization=OptimizationSettings(epochs=1, warmup_epochs=0, lr_base=0.1),
        )
        models.append(task.trainable_module.model)
    for p, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)


def test_the_log_names_the_size_and_what_is_left_over(tmp_path, data, messages):
    flags = ('-b', '4', '--contrast-batch-size', '16', '--epochs', '1')
    runs.train(data, tmp_path, *flags, base=FLAGS)
    said = messages()
    assert any(line.startswith('Contrast over 16 images (4 x 4 batches x 1 process(es)') for line in said)
    (left,) = [line for line in said if line.startswith('An epoch has')]
    assert left == (
        'An epoch has 6 batches, and contrasts 4 at a time: the last 2 of an epoch are contrasted with each other only.'
    )
    assert 'An update: 16 images x 1 batch(es) x 1 process(es) = 16 images; 2 updates an epoch.' in said


def test_the_rate_grows_with_the_images_of_an_update(tmp_path, data, messages):
    flags = ('-b', '4', '--contrast-batch-size', '8', '--epochs', '1', '--lr-base', '0.1')
    runs.train(data, tmp_path, *flags, base=FLAGS)
    assert 'effective global batch size (8) with linear scaling' in ' '.join(messages())


def test_with_a_global_batch_size_it_counts_images_of_all_processes(data, messages):
    words = ['--coretune', '--data-dir', str(data), '--global-batch-size', '8', '--contrast-batch-size', '16']
    settings = parse_args(words).settings
    settings = share_batch(settings, 2)
    assert (settings.data.batch_size, settings.data.contrast_batches) == (4, 2)
    log_contrast(settings, create_datasets(settings.data), 2)
    assert messages()[-1].startswith('Contrast over 16 images (4 x 2 batches x 2 process(es)')


def test_more_images_than_an_epoch_has_are_refused(tmp_path, data):
    match = r'--contrast-batch-size: expected at most 24, the images of the 6 batch\(es\) of 4 of an epoch, got 28\.'
    with pytest.raises(ValueError, match=match):
        runs.train(data, tmp_path, '-b', '4', '--contrast-batch-size', '28', base=FLAGS)


def test_a_task_that_contrasts_nothing_and_an_optimizer_of_second_order_are_refused():
    plain = ClassificationTask(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), verbose=False)
    config = LoopConfig(contrast_batches=2)
    with pytest.raises(TypeError, match='got a ClassificationTask'):
        Trainer(plain, torch.optim.SGD(plain.parameters(), lr=0.1), Accelerator(cpu=True), config=config)
    task = make_task(SCENARIOS['vit'])
    optimizer = optimizer_of(task)
    optimizer.is_second_order = True
    with pytest.raises(ValueError, match='with SGD, got 2. It differentiates gradients'):
        Trainer(task, optimizer, Accelerator(cpu=True), config=config)
