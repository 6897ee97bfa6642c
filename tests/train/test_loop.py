"""The loop: gradients of accumulated batches, validation that counts each image once, patience, and its end"""

import math

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.task import ClassificationTask

from timm_coretune import CoreTuningTask
from timm_coretune.train import Trainer
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.loop import LoopConfig


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


def test_gradients_of_accumulated_batches_are_averaged_with_a_short_last_group(tiny):
    dataset = create_datasets(parse_args(['--data-dir', str(tiny)]).settings.data).train
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


def test_a_loss_that_is_not_finite_stops_training_with_its_step_and_the_last_finite_losses():
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])) for _ in range(6)]
    batches[3][0][0, 0, 0, 0] = float('nan')
    task = CoreTuningTask(timm.create_model('test_resnet', num_classes=2), verbose=False)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    trainer = Trainer(task, optimizer, Accelerator(cpu=True), config=LoopConfig(log_interval=100))
    with pytest.raises(ValueError, match=r'at update 4\. The last finite losses: loss \d.*task \d.*contrast \d'):
        trainer.train_one_epoch(0, batches)
