"""Steps and validation batches do not wait for the device: on fakes of a GPU, and on a real one if there is one"""

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.task import ClassificationTask
from waits import CUDA, Waits, fake_cuda

from timm_coretune.evaluation.classification import ClassificationEvaluator
from timm_coretune.evaluation.multi_label import MultiLabelEvaluator
from timm_coretune.evaluation.segmentation import SegmentationEvaluator
from timm_coretune.loss import METHODS
from timm_coretune.segmentation import SegmentationTask, create_segmentation_model
from timm_coretune.task import CoreTuningTask
from timm_coretune.train import Trainer
from timm_coretune.train.loop_config import LoopConfig
from timm_coretune.train.loss_meter import LossMeter
from timm_coretune.train.watching.diverged import Place

KINDS = ('plain', *METHODS, 'pixels')


def classifier():
    return timm.create_model('test_resnet', num_classes=5)


def task_of(kind):
    if kind == 'pixels':
        backbone = timm.create_model('test_resnet', num_classes=0)
        return SegmentationTask(create_segmentation_model(backbone, 5, img_size=(32, 32)), 'core', verbose=False)
    if kind == 'plain':
        return ClassificationTask(classifier(), torch.nn.CrossEntropyLoss(), verbose=False)
    return CoreTuningTask(classifier(), kind, verbose=False)


def start(task):
    optimizer = torch.optim.SGD(task.parameters(), 0.01, momentum=0.9)
    if hasattr(task, 'attach_optimizer'):
        task.attach_optimizer(optimizer)
        task.start(10)
    return optimizer


def batch_of(kind, device):
    target = torch.arange(8, device=device) % 5
    return torch.randn(8, 3, 32, 32, device=device), target[:, None, None].expand(
        8, 32, 32
    ) if kind == 'pixels' else target


EVALUATORS = {
    'images': lambda device: ClassificationEvaluator(device, ['confusion', 'per-class', 'ece'], 5),
    'several-labels': lambda device: MultiLabelEvaluator(device, metrics=['per-class'], num_classes=5),
    'pixels': lambda device: SegmentationEvaluator(5, device=device),
}


def outputs_of(kind, device):
    shape = (6, 5, 9, 9) if kind == 'pixels' else (6, 5)
    target = torch.zeros(6, 5, device=device) if kind == 'several-labels' else torch.zeros(6, device=device).long()
    return torch.randn(shape, device=device), target[:, None, None].expand(6, 9, 9) if kind == 'pixels' else target


def test_what_waits_is_seen():
    x = torch.arange(4.0)
    for wait in (
        x.nonzero, x.unique, lambda: x[x > 1], lambda: bool(x.any()), lambda: x.long().bincount(), x[0].item
    ):  # fmt: skip
        with Waits() as waits:
            wait()
        assert waits.found
    with fake_cuda() as waits:
        x = torch.zeros(2, device=CUDA)
        x.to('cpu', non_blocking=True)
        assert waits.found == []
        x.cpu()
        torch.tensor(1.0, device=CUDA)
        assert len(waits.found) == 2
        with pytest.raises(Exception, match='_local_scalar_dense'):
            x.sum().item()


@pytest.mark.parametrize('kind', KINDS)
def test_the_losses_of_a_step_do_not_wait(kind, monkeypatch):
    # it differentiates, which needs a real device
    monkeypatch.setattr('timm_coretune.segmentation.model.freeze_unused', lambda *args: None)
    with fake_cuda() as waits:
        with CUDA:
            task = task_of(kind)
        start(task)
        meter = LossMeter(Accelerator(cpu=True))
        waits.found.clear()
        meter.update(task(*batch_of(kind, CUDA)), 1)
    assert waits.found == []


@pytest.mark.parametrize('kind', KINDS)
def test_the_rest_of_a_step_does_not_wait(kind, monkeypatch):
    task = task_of(kind)
    trainer = Trainer(task, start(task), Accelerator(cpu=True), config=LoopConfig(uneven_batches=True))
    task.get_trainable_module().train()
    batch = batch_of(kind, 'cpu')
    result = task(*batch)  # on a CPU it looks at the targets, where that costs nothing
    monkeypatch.setattr(type(task), 'forward', lambda *args: result)
    before = [parameter.clone() for parameter in task.parameters()]
    trainer.checks_always = False  # as on a GPU
    with Waits() as waits:
        trainer._step(*batch, 1, True, Place(0, 0, 1))
    assert waits.found == []
    assert any((a != b).any() for a, b in zip(before, task.parameters(), strict=True))


@pytest.mark.parametrize('kind', EVALUATORS)
def test_a_validation_batch_does_not_wait(kind):
    with fake_cuda() as waits:
        evaluator = EVALUATORS[kind](CUDA)
        waits.found.clear()
        for _ in range(2):
            evaluator.update(*outputs_of(kind, CUDA))
        assert waits.found == []


@pytest.fixture
def no_waiting():
    yield lambda: torch.cuda.set_sync_debug_mode('error')
    torch.cuda.set_sync_debug_mode('default')


@pytest.mark.gpu
@pytest.mark.parametrize('kind', KINDS)
def test_a_step_on_a_gpu_does_not_wait(kind, no_waiting):
    task = task_of(kind).to('cuda')
    trainer = Trainer(task, start(task), Accelerator())
    task.get_trainable_module().train()
    batch = batch_of(kind, 'cuda')
    trainer._step(*batch, 1, True)  # libraries load, and the optimizer creates its state
    no_waiting()
    trainer.meter.update(trainer._step(*batch, 1, True), 1)


@pytest.mark.gpu
@pytest.mark.parametrize('kind', EVALUATORS)
def test_a_validation_batch_on_a_gpu_does_not_wait(kind, no_waiting):
    evaluator = EVALUATORS[kind](torch.device('cuda'))
    batch = outputs_of(kind, 'cuda')
    evaluator.update(*batch)
    no_waiting()
    evaluator.update(*batch)
