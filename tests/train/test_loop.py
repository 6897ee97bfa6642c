"""The loop: gradients of accumulated batches, validation that counts each image once, patience, and its end"""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from timm.task import ClassificationTask

from timm_coretune import CoreTuningTask
from timm_coretune.train import Trainer
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.data.datasets import create_datasets
from timm_coretune.train.loop_config import LoopConfig
from timm_coretune.train.processes import check_accumulation, precision_of


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
    monkeypatch.setattr(trainer.validator, 'evaluate', lambda loader: {'top1': metrics[trained[-1]]})
    trainer.fit([], [], range(len(metrics)))
    assert len(trained) == stop


def fitted(monkeypatch, losses, scores=None, start=0, best=(None, None), **config):
    """A trainer after epochs with these losses and scores, and the epochs that it trained."""
    task = ClassificationTask(torch.nn.Linear(1, 2), torch.nn.CrossEntropyLoss(), verbose=False)
    trainer = Trainer(task, torch.optim.SGD(task.parameters(), 0.1), Accelerator(cpu=True), config=LoopConfig(**config))
    trainer.best = best
    trained = []
    monkeypatch.setattr(trainer, 'train_one_epoch', lambda epoch, *_: trained.append(epoch) or {'loss': losses[epoch]})
    monkeypatch.setattr(trainer.validator, 'evaluate', lambda loader: {trainer.config.eval_metric: scores[trained[-1]]})
    trainer.fit([], None if scores is None else [], range(start, len(losses)))
    return trainer, trained


@pytest.mark.parametrize('eval_metric', ['top1', 'loss'])
def test_without_validation_the_lowest_training_loss_is_the_best(monkeypatch, messages, eval_metric):
    losses = [3.0, 2.0, 1.0, 1.5, 1.4, 0.5]
    trainer, trained = fitted(monkeypatch, losses, patience=2, eval_metric=eval_metric)
    assert trainer.best == (1.0, 2)
    assert trained == [0, 1, 2, 3, 4]
    assert 'No better loss in 2 validations: stopping.' in messages()


@pytest.mark.parametrize('eval_metric, sign', [('top1', 1), ('loss', -1)])
@pytest.mark.parametrize(
    'scores, best',
    [([math.nan, 1.0, 2.0], 2), ([1.0, math.nan, 0.5], 0), ([math.nan, math.nan], 0), ([math.nan, 3.0, math.nan], 1)],
)
def test_not_a_number_is_worse_than_any_score(monkeypatch, eval_metric, sign, scores, best):
    scores = [sign * score for score in scores]
    trainer, _ = fitted(monkeypatch, [0.0] * len(scores), scores, eval_metric=eval_metric)
    assert trainer.best[1] == best


def test_patience_is_not_lost_in_epochs_without_a_score(monkeypatch):
    # a run that starts late, and one whose best is of another --val-interval: both end with a validation
    _, trained = fitted(monkeypatch, [0.0] * 9, [1.0] * 9, start=6, patience=1, val_interval=4)
    assert trained == [6, 7, 8]
    _, trained = fitted(monkeypatch, [0.0] * 9, [1.0] * 9, start=3, best=(2.0, 2), patience=1, val_interval=2)
    assert trained == [3, 4, 5]


def test_a_way_to_share_statistics_that_there_is_not_is_refused():
    for dist_bn in ('reduce', 'broadcast', 'none', ''):
        LoopConfig(dist_bn=dist_bn)
    with pytest.raises(ValueError, match="got 'mean'"):
        LoopConfig(dist_bn='mean')


def test_gradients_that_accelerate_would_divide_too_are_refused():
    task = ClassificationTask(torch.nn.Linear(1, 2), torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    with pytest.raises(ValueError, match=r'gradient_accumulation_steps 4 in accelerate.*--grad-accum-steps 4'):
        Trainer(task, optimizer, Accelerator(cpu=True, gradient_accumulation_steps=4))


def test_gradients_that_deepspeed_would_divide_too_are_refused():
    def check(plugin):
        # an Accelerator with this plugin needs DeepSpeed
        state = SimpleNamespace(deepspeed_plugin=plugin)
        check_accumulation(SimpleNamespace(gradient_accumulation_steps=1, state=state))

    for steps in (1, 'auto'):
        check(DeepSpeedPlugin(gradient_accumulation_steps=steps))
    config = {'zero_optimization': {'stage': 2}, 'gradient_accumulation_steps': 3}
    with pytest.raises(ValueError, match=r'steps 3 in the configuration of DeepSpeed.*raise the batch size'):
        check(DeepSpeedPlugin(hf_ds_config=config))


def test_float16_on_a_cpu_is_said_to_be_float32(messages):
    task = ClassificationTask(torch.nn.Linear(1, 2), torch.nn.CrossEntropyLoss(), verbose=False)
    accelerator = Accelerator(cpu=True, mixed_precision='fp16')
    Trainer(task, torch.optim.SGD(task.parameters(), 0.1), accelerator)
    (warning,) = messages('WARNING')
    assert warning == 'Mixed precision in float16 needs a GPU: this run computes in float32, on the CPU.'
    assert task(torch.rand(2, 1), torch.tensor([0, 1]))['output'].dtype == torch.float32
    assert precision_of(accelerator).startswith('no, since float16 needs a GPU')


def test_neighbouring_outputs_are_averaged_in_validation():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(12, 6, generator=generator)
    target = torch.tensor([0, 1, 2, 3]).repeat_interleave(3)
    task = ClassificationTask(torch.nn.Identity(), torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    trainer = Trainer(task, optimizer, Accelerator(cpu=True), config=LoopConfig(tta=3))
    metrics = trainer.validator.validate([(outputs[:6], target[:6]), (outputs[6:], target[6:])])
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
    monkeypatch.setattr('timm_coretune.train.watching.validator.num_own_samples', lambda loader, accelerator: last)
    metrics = trainer.validator.validate(
        [(output[part : part + 10], target[part : part + 10]) for part in range(0, 40, 10)]
    )
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
