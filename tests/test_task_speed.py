"""A step of CoreTuningTask is one graph, and never waits for the device"""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from compiling import needs_generators_in_graphs
from tasks import BATCH_SIZE, IMAGE_SIZE, NUM_CLASSES, TARGET, create_model, create_task, gradients, images, step
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from waits import Waits, skip_without_fake_cuda

from timm_coretune import CoreTuningLoss, HardPairMixup
from timm_coretune.task import CoreTuningModule

# compilation


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_a_compiled_task_trains_and_evaluates_with_the_numbers_of_an_eager_one(name, fresh_dynamo):
    eager, compiled = create_task(create_model(name)), create_task(create_model(name))
    assert compiled.compile(backend='aot_eager', fullgraph=True) is compiled.get_eval_model()
    optimizers = [torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01) for task in (eager, compiled)]
    for i in range(3):
        expected = step(eager, images(seed=i), TARGET, optimizers[0])
        actual = step(compiled, images(seed=i), TARGET, optimizers[1])
        assert actual.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5, msg=key)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1  # compiled, and never again
    eager.get_trainable_module().eval()
    compiled.get_trainable_module().eval()
    with torch.no_grad():
        expected = eager.get_eval_model()(images())
        torch.testing.assert_close(compiled.get_eval_model()(images()), expected, rtol=1e-5, atol=1e-4)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2
    assert list(compiled.get_checkpoint_state()['state_dict']) == list(create_model(name).state_dict())
    assert set(compiled.get_task_state()) == {'projector', 'generator'}


def test_a_compiled_step_runs_the_head_once(fresh_dynamo):
    task = create_task(create_model('test_efficientnet'))
    num_convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in task.get_eval_model().modules())
    compiled = []

    def count(graph, _):
        nodes = [node for node in graph.graph.nodes if node.op.startswith('call')]
        compiled.append(sum('conv2d' in str(node.target) for node in nodes))
        return graph

    task.trainable_module = torch.compile(task.trainable_module, backend=count, fullgraph=True)
    for i in range(2):
        task(images(seed=i), TARGET)
    assert compiled == [num_convolutions]


@pytest.mark.parametrize('autocast', [False, True], ids=['float32', 'bfloat16 autocast'])
@pytest.mark.parametrize('soft', [False, True], ids=['class indices', 'soft targets'])
@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('test_resnet', {}),
        ('test_resnet', {'smooth': 'negative', 'smooth_weight': 0.3, 'positive_candidates': 4}),
        ('test_vit', {}),
    ],
    ids=['test_resnet', 'other mixtures', 'test_vit'],
)
def test_the_training_step_is_one_graph(name, kwargs, soft, autocast, fresh_dynamo):
    module = create_task(create_model(name), **kwargs).get_trainable_module()
    target = torch.nn.functional.one_hot(TARGET, NUM_CLASSES).float() if soft else TARGET
    batch, draws = module.criterion.prepare(BATCH_SIZE, TARGET.device)
    with torch.autocast('cpu', torch.bfloat16) if autocast else nullcontext():
        explained = torch._dynamo.explain(module)(images(), target, batch, draws)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


# synchronisation with the device


class ItemLoss(CoreTuningLoss):
    def compute(self, features, logits, target, batch, draws):
        features.sum().item()
        return super().compute(features, logits, target, batch, draws)


class NonzeroLoss(CoreTuningLoss):
    def compute(self, features, logits, target, batch, draws):
        target.nonzero()
        return super().compute(features, logits, target, batch, draws)


class BranchLoss(CoreTuningLoss):
    def compute(self, features, logits, target, batch, draws):
        if (target == 0).any():
            logits = logits * 1.0
        return super().compute(features, logits, target, batch, draws)


class MaskLoss(CoreTuningLoss):
    def compute(self, features, logits, target, batch, draws):
        logits[target == 0].sum()
        return super().compute(features, logits, target, batch, draws)


class DownloadLoss(CoreTuningLoss):
    def compute(self, features, logits, target, batch, draws):
        return super().compute(features, logits, target.cpu().to(target.device, non_blocking=True), batch, draws)


class UploadLoss(CoreTuningLoss):
    def compute(self, features, logits, target, batch, draws):
        weight = torch.ones(logits.shape[1], device='cpu').to(logits.device)
        return super().compute(features, logits * weight, target, batch, draws)


def training_module(criterion, name, **kwargs):
    model = create_model(name)
    return CoreTuningModule(model, criterion(model.num_features, **kwargs)).train()


def fake_step(criterion, name, soft, **kwargs):
    """A step on tensors without data, where whatever needs the data of a tensor raises."""
    real = training_module(criterion, name, **kwargs)
    batch, draws = real.criterion.prepare(BATCH_SIZE, TARGET.device)
    target = torch.full((BATCH_SIZE, NUM_CLASSES), 0.25) if soft else TARGET
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        memo = {id(real.criterion.mixup.generator): real.criterion.mixup.generator}  # has no data to be copied here
        module, input, target, draws = copy.deepcopy((real, images(), target, draws), memo)
    with mode:
        module(input, target, batch, draws)['loss'].backward()
    return gradients(module)


@pytest.mark.parametrize('soft', [False, True], ids=['class indices', 'soft targets'])
@pytest.mark.parametrize('contrast_weight', [0.1, 0.0])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_a_step_never_asks_for_the_value_of_a_tensor(name, contrast_weight, soft):
    grads = fake_step(CoreTuningLoss, name, soft, contrast_weight=contrast_weight, label_smoothing=0.1)
    assert all(grad is not None for grad in grads.values())


@pytest.mark.parametrize('criterion', [ItemLoss, NonzeroLoss, BranchLoss, MaskLoss])
def test_asking_for_the_value_of_a_tensor_would_be_noticed(criterion):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        fake_step(criterion, 'test_vit', soft=False)


def waits_of(criterion):
    """Waits of a forward pass on an accelerator that need not exist, as its tensors hold no data."""
    skip_without_fake_cuda()
    pinned = mock.patch.object(torch.Tensor, 'pin_memory', lambda self: self)  # torch has no fakes of pinned memory
    with FakeTensorMode(), torch.device('cuda'), pinned:
        module = training_module(criterion, 'test_resnet')
        input, target = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(NUM_CLASSES, (4,))
        with Waits() as waits:
            batch, draws = module.criterion.prepare(4, target.device)
            output = module(input, target, batch, draws)
        assert output['loss'].device.type == 'cuda'
        return waits


def test_only_the_draws_travel_to_the_accelerator_and_none_waits_for_them():
    waits = waits_of(CoreTuningLoss)
    assert waits.found == []
    assert waits.unwaited == [('cpu', 'cuda')]


@needs_generators_in_graphs
@pytest.mark.parametrize('positive_candidates', [0, 2])
def test_a_compiled_draw_makes_one_copy_as_an_eager_one_does(positive_candidates, fresh_dynamo):
    mixup = HardPairMixup(positive_candidates=positive_candidates)
    counted = []

    def count(graph, _):
        counted.append(sum(node.op == 'call_method' and node.target == 'to' for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(mixup.draw, backend=count, fullgraph=True)(4, torch.device('meta'))
    with Waits() as waits:
        eager = mixup.draw(4, torch.device('meta'))
    assert counted == [len(waits.unwaited)] == [1]
    assert [draw.shape for draw in compiled] == [draw.shape for draw in eager]
    assert {draw.device.type for draw in (*compiled, *eager)} == {'meta'}


@pytest.mark.parametrize('criterion, direction', [(DownloadLoss, 'cuda to cpu'), (UploadLoss, 'cpu to cuda')])
def test_a_copy_that_waits_would_be_noticed(criterion, direction):
    assert direction in ' '.join(waits_of(criterion).found)


@pytest.mark.gpu
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_a_step_on_a_cuda_device_never_synchronises(name):
    device = torch.device('cuda')
    task = create_task(create_model(name).to(device), device=device)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    input, target = images().to(device), TARGET.to(device)
    step(task, input, target, optimizer)  # libraries may synchronise while they start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        result = step(task, input, target, optimizer)
        with pytest.raises(RuntimeError, match='synchroniz'):
            result['loss'].item()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert result['loss'].isfinite()
