"""What every method must pass: a method that is added to METHODS is tested here without a further line

It needs its reference in tests/helpers/methods/, and arguments in method_runs.py if its own do not fit small batches.
"""

import inspect
import re
from pathlib import Path

import pytest
import runs
import segmentation_runs
import timm
import torch
from method_runs import BATCH_SIZE, NUM_CLASSES, NUM_UPDATES, arguments, batches, create_model, create_run
from methods import Step, expected_losses
from methods_worker import WORLD_SIZE, train
from ranks import launch_ranks
from reference import random_soft_target
from safetensors.torch import load, load_file, save
from timm.utils import CheckpointSaver
from torch.utils._python_dispatch import TorchDispatchMode

from timm_coretune import load_segmentation_model
from timm_coretune.loss import METHODS
from timm_coretune.loss.base import defaults_of
from timm_coretune.loss.parts.forward import forward_maps

DOCS = Path(__file__).parents[2] / 'docs' / 'methods.md'

TARGETS = {
    'classes': torch.tensor([0, 1, 0, 2, 1, 0, 0, 2]),
    'a class alone': torch.tensor([0, 0, 0, 1, 0, 0]),
    'one class': torch.tensor([2, 2, 2, 2]),
    'one image': torch.tensor([1]),
    'soft': random_soft_target(0, BATCH_SIZE, NUM_CLASSES),
}
every_method = pytest.mark.parametrize('method', METHODS)


def assert_same_state(state, expected, **tolerance):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=lambda text, name=name: f'{name}: {text}', **tolerance)


def images_for(target):
    generator = torch.Generator().manual_seed(len(target))
    return torch.randn(len(target), 3, 32, 32, generator=generator, dtype=torch.float64)


def step_of(run, input, target, pretrained, num_done):
    """What the reference needs to know, before the task computes its loss."""
    model = run.task.get_eval_model()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(input), pre_logits=True)
        logits = model.get_classifier()(features)
    return Step(run.task.criterion, model, pretrained, num_done, NUM_UPDATES, input, features, logits, target)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('num_done', [0, 2])
@every_method
def test_the_losses_are_those_of_plain_loops(method, num_done, smoothing):
    run = create_run(method, dtype=torch.float64, label_smoothing=smoothing)
    pretrained = {name: p.detach().clone() for name, p in run.task.get_eval_model().named_parameters()}
    for batch in batches(dtype=torch.float64)[:num_done]:
        run.update(batch)
    for kind, target in TARGETS.items():
        input = images_for(target)
        expected = expected_losses(method, step_of(run, input, target, pretrained, num_done))
        result = run.task(input, target)
        found = {name: value.item() for name, value in result.items() if name.endswith('loss')}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), kind
        run.optimizer.zero_grad()
        result['loss'].backward()
        for name, p in run.task.get_trainable_module().named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f'{name} has no gradient, which stalls DistributedDataParallel'
                assert torch.isfinite(p.grad).all(), (kind, name)


@pytest.mark.parametrize('method', [name for name, loss in METHODS.items() if loss.for_pixels and name != 'core'])
def test_rows_without_a_class_take_no_part(method):
    """Empty places of anchors. The draws of Core-tuning depend on their number: see test_edges.py."""
    run = create_run(method, dtype=torch.float64)
    pretrained = {name: p.detach().clone() for name, p in run.task.get_eval_model().named_parameters()}
    target = torch.tensor([0, -1, 1, 0, -1, 2, 1])
    input, own = images_for(target), target >= 0
    step = step_of(run, input, target, pretrained, 0)
    labelled = step._replace(
        input=input[own], features=step.features[own], logits=step.logits[own], target=target[own]
    )  # fmt: skip
    criterion = run.task.criterion
    given = {'input': input, 'model': step.model, 'classifier': step.model.get_classifier()}
    required = {name: given[name] for name in criterion.requires}
    expected = expected_losses(method, labelled)
    prepared = criterion.prepare(len(target), target.device)
    losses = criterion.compute(step.features, step.logits, target, *prepared, **required)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-9)
    clean = torch.tensor(7.0, dtype=torch.float64)
    losses = criterion.compute(step.features, step.logits, target, *prepared, clean_loss=clean, **required)
    assert losses['task_loss'] == 7.0


# a loop of one's own


@every_method
def test_a_loop_of_ones_own_gets_the_losses_of_the_task(method):
    run = create_run(method)
    torch.manual_seed(0)
    model = create_model()
    criterion = METHODS[method](
        model.num_features, **arguments(method, generator=torch.Generator().manual_seed(0))
    )  # fmt: skip
    criterion.attach(model)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9)
    criterion.attach_optimizer(optimizer, model)
    criterion.start(NUM_UPDATES)
    for input, target in batches():
        expected = run.update((input, target))
        features = model.forward_head(model.forward_features(input), pre_logits=True)
        logits = model.get_classifier()(features)
        _, maps = forward_maps(model, input, criterion.map_indices or [0])
        given = {'input': input, 'model': model, 'classifier': model.get_classifier(), 'maps': maps}
        loss = criterion(features, logits, target, **{name: given[name] for name in criterion.requires})
        assert loss.item() == pytest.approx(expected['loss'], rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.after_update(model)


# two processes


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, one_thread):
    ranks = launch_ranks('methods_worker.py', WORLD_SIZE, tmp_path)
    for method in METHODS:
        expected = train(method)
        for index, losses in enumerate(expected['losses']):
            for name, value in losses.items():
                mean = sum(found[method]['losses'][index][name] for found in ranks) / WORLD_SIZE
                assert mean == pytest.approx(value, rel=1e-8, abs=1e-10), (method, index, name)
        for found in ranks:
            state = {name.removeprefix('module.'): value for name, value in found[method]['state'].items()}
            assert_same_state(state, expected['state'], rtol=1e-7, atol=1e-9)


# state


@every_method
def test_a_resumed_run_continues_bit_for_bit(method, tmp_path, one_thread):
    first, second = batches()[:2], batches()[2:]
    run = create_run(method)
    for batch in first:
        run.update(batch)
    saver = CheckpointSaver(
        run.task.get_eval_model(), run.optimizer, task=run.task, checkpoint_dir=str(tmp_path)
    )  # fmt: skip
    saver.save_checkpoint(0, metric=1.0)
    expected = [run.update(batch) for batch in second]
    resumed = create_run(method, seed=7, checkpoint=tmp_path / 'last.pth.tar')
    assert [resumed.update(batch) for batch in second] == expected
    assert_same_state(resumed.state(), run.state(), rtol=0, atol=0)


@every_method
def test_the_state_dict_of_model_and_loss_goes_through_safetensors(method):
    run, other = create_run(method), create_run(method, seed=7)
    for batch in batches()[:2]:
        run.update(batch)
    module = timm.utils.unwrap_model(other.task.trainable_module)
    module.load_state_dict(load(save(run.state())))
    assert_same_state(other.state(), run.state(), rtol=0, atol=0)
    last = batches()[2]
    assert other.update(last)['loss'] == run.update(last)['loss']


@every_method
def test_the_moving_average_and_the_tuned_model_are_plain_timm_models(method):
    run = create_run(method)
    run.task.setup_ema(decay=0.75)
    before = {name: p.clone() for name, p in run.task.get_eval_model().state_dict().items()}
    run.update(batches()[0])
    run.task.update_ema()
    plain = create_model().state_dict()
    for ema in (False, True):
        assert type(run.task.get_eval_model(ema=ema)) is type(create_model())
        state = run.task.get_checkpoint_state(ema=ema)
        (weights,) = (value for name, value in state.items() if name.startswith('state_dict'))
        assert list(weights) == list(plain)
    after = run.task.get_eval_model().state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for name, average in run.task.get_eval_model(ema=True).state_dict().items():
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * after[name], rtol=1e-5, atol=1e-7, msg=name)
    with torch.no_grad():
        run.task.get_eval_model(ema=True)(batches()[0][0])


# precision and compilation


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@every_method
def test_a_compiled_step_is_one_graph_for_the_whole_run_with_equal_losses(method, fresh_dynamo):
    eager = create_run(method)
    compiled = create_run(method, prepare=lambda task: task.compile(backend='aot_eager', fullgraph=True))
    for batch in batches():
        expected = eager.update(batch)
        assert compiled.update(batch) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.parametrize('kind', ['autocast', 'weights'])
@every_method
def test_in_bfloat16_losses_are_near_those_of_float32(method, kind):
    run = create_run(method)
    half = create_run(method, dtype=torch.bfloat16 if kind == 'weights' else None)
    for input, target in batches()[:2]:
        expected = run.update((input, target))
        with torch.autocast('cpu', torch.bfloat16, enabled=kind == 'autocast'):
            found = half.update((input.to(torch.bfloat16) if kind == 'weights' else input, target))
        assert found == pytest.approx(expected, rel=0.1, abs=0.05)
    for name, p in half.task.get_trainable_module().named_parameters():
        assert torch.isfinite(p).all(), name


class NoValues(TorchDispatchMode):
    """Raises where the program asks for the value of a tensor, for which it waits on an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f'{func} waits for the device')
        return func(*args, **(kwargs or {}))


@every_method
def test_an_update_never_asks_for_the_value_of_a_tensor(method):
    run = create_run(method)
    module = run.task.get_trainable_module()
    for input, target in batches()[:2]:
        with NoValues():
            result = module(input, target, *run.task.criterion.prepare(BATCH_SIZE, target.device))
            run.optimizer.zero_grad()
            result['loss'].backward()
            run.optimizer.step()
            run.task.after_update()


# train.py


@every_method
def test_train_py_trains_with_it(method, tmp_path, data):
    folder = runs.train(data, tmp_path, '--method', method, '--epochs', '1')
    assert 0.0 < float(runs.rows_of(folder / 'summary.csv')[0]['train_loss']) < 20.0
    state = load_file(folder / 'model_best.safetensors')
    timm.create_model('test_resnet', num_classes=4).load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize('method', [name for name, loss in METHODS.items() if loss.for_pixels])
def test_train_py_trains_pixels_with_it(method, tmp_path):
    segmentation_runs.write_odd(tmp_path / 'data', 'folders')
    folder = segmentation_runs.train(tmp_path / 'data', tmp_path, '--method', method, '--num-classes', '3')
    assert 0.0 < segmentation_runs.last_row(folder)['train_loss'] < 10.0
    load_segmentation_model(folder)


# the house


@every_method
def test_it_has_a_row_in_the_docs_and_its_defaults_there(method):
    rows = [line.strip('| ').split(' | ') for line in DOCS.read_text().splitlines() if line.startswith('| `')]
    ((_, paper, _, _, defaults, pixels),) = [row for row in rows if row[0] == f'`{method}`']
    assert 'https://arxiv.org/abs/' in paper
    assert pixels == ('yes' if METHODS[method].for_pixels else 'no')
    known = defaults_of(METHODS[method])
    for name, value in re.findall(r'(\w+)=([\w.]+)', defaults):
        assert float(value) == known[name], name


@pytest.mark.parametrize('method', [name for name in METHODS if name != 'core'])
def test_it_is_a_file_of_150_lines_that_names_its_paper(method):
    lines = inspect.getsource(inspect.getmodule(METHODS[method])).splitlines()
    assert len(lines) <= 150
    assert any('https://arxiv.org/abs/' in line for line in lines[:15])
