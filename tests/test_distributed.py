"""Protects the step over several processes: their averaged gradient is that of one process with the global batch"""

import pytest
import torch
import torch.distributed as dist
from distributed_worker import (
    SCENARIOS,
    WORLD_SIZES,
    Scenario,
    global_batch,
    gradients,
    hessian_product,
    make_task,
)
from losses import drawn_numbers, settings_of
from ranks import launch_ranks
from reference import layer_of, objective

from timm_coretune.distributed import GlobalBatch
from timm_coretune.mixup import MixupDraws

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason='torch was built without gloo'
)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """Function of a scenario's name: what its ranks found."""
    ranks = launch_ranks('distributed_worker.py', max(WORLD_SIZES), tmp_path_factory.mktemp('ranks'))
    return lambda name: [rank[name] for rank in ranks[: len(SCENARIOS[name].sizes)]]


def draws_of_ranks(scenario: Scenario) -> list[MixupDraws]:
    """Image b of process r takes draw b * world_size + r."""
    world_size = len(scenario.sizes)
    draws = make_task(scenario).criterion.mixup.draw(world_size * max(scenario.sizes))
    return [
        MixupDraws(*(column[[b * world_size + r for b in range(size)]] for column in draws))
        for r, size in enumerate(scenario.sizes)
    ]


def read_by_one_process(scenario: Scenario) -> tuple[torch.Tensor, torch.Tensor, MixupDraws]:
    """Images, targets and draws of all ranks, in the order of one process: the first images of all, the second, ..."""
    images, target = global_batch(scenario)
    draws = MixupDraws(*map(torch.cat, zip(*draws_of_ranks(scenario), strict=True)))
    order = []
    for b in range(max(scenario.sizes)):
        for rank, size in enumerate(scenario.sizes):
            if b < size:
                order.append(sum(scenario.sizes[:rank]) + b)
    return images[order], target[order], MixupDraws(*(draw[order] for draw in draws))


def one_process(scenario: Scenario, images: torch.Tensor, target: torch.Tensor, draws: MixupDraws) -> dict:
    task = make_task(scenario)
    draws = draws if scenario.mixup_enabled else None
    losses = task.trainable_module(images, target, GlobalBatch(0, [len(images)]), draws)
    losses['loss'].backward()
    losses.pop('output')
    return {'losses': {name: loss.item() for name, loss in losses.items()}, 'gradients': gradients(task)}


def layers_of(classifier: torch.nn.Module) -> tuple:
    layers = tuple(layer_of(layer) for layer in classifier.modules() if isinstance(layer, torch.nn.Linear))
    return layers if len(layers) > 1 else layers[0]


def relative_error(actual: dict, expected: dict) -> float:
    """The largest over the parameters, each relative to the largest entry of any gradient."""
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max() / scale for name in expected).item()


def mean_losses(ranks: list[dict]) -> dict:
    return {name: sum(rank['losses'][name] for rank in ranks) / len(ranks) for name in ranks[0]['losses']}


GATHERED = [name for name, s in SCENARIOS.items() if s.loss_kwargs.get('gather', True) and s.sum_over_ranks]
NOT_GATHERED = [name for name, s in SCENARIOS.items() if not s.loss_kwargs.get('gather', True)]
NEGATIVE_CONTROLS = [name for name, s in SCENARIOS.items() if not s.sum_over_ranks]


@pytest.mark.slow
@pytest.mark.parametrize('name', GATHERED)
def test_the_averaged_gradient_is_that_of_one_process_with_the_global_batch(name, found):
    scenario, ranks = SCENARIOS[name], found(name)
    expected = one_process(scenario, *read_by_one_process(scenario))
    for rank in ranks:
        assert relative_error(rank['gradients'], expected['gradients']) < 1e-10
    assert mean_losses(ranks) == pytest.approx(expected['losses'], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('name', GATHERED)
def test_a_product_with_the_hessian_is_that_of_one_process_with_the_global_batch(name, found):
    scenario = SCENARIOS[name]
    images, target, draws = read_by_one_process(scenario)
    draws = draws if scenario.mixup_enabled else None
    expected = hessian_product(make_task(scenario), images, target, GlobalBatch(0, [len(images)]), draws)
    for rank in found(name):
        assert relative_error(rank['product'], expected) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize('name', GATHERED)
def test_the_mean_loss_of_the_ranks_is_the_loss_of_the_reference_on_the_global_batch(name, found):
    scenario = SCENARIOS[name]
    images, target, draws = read_by_one_process(scenario)
    task = make_task(scenario)
    features, criterion, drawn = task.trainable_module.model.forward_features(images), task.criterion, {}
    if scenario.mixup_enabled:
        label = target.argmax(dim=1) if scenario.soft else target
        drawn = drawn_numbers(criterion, features, label, draws)
    expected = objective(
        features,
        target,
        layers_of(task.trainable_module.model.head),
        criterion.projector and (layer_of(criterion.projector.fc1), layer_of(criterion.projector.fc2)),
        **drawn,
        **settings_of(criterion),
    )
    assert mean_losses(found(name)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('name', NOT_GATHERED)
def test_without_gathering_the_gradient_is_the_mean_of_those_of_the_local_losses(name, found):
    scenario, ranks = SCENARIOS[name], found(name)
    world_size = len(scenario.sizes)
    parts = zip(*(x.split(list(scenario.sizes)) for x in global_batch(scenario)), strict=True)
    local = []
    for rank, (images, target) in enumerate(parts):
        # generators seeded alike, of whose draws each process takes its share
        draws = make_task(scenario).criterion.mixup.draw(world_size * len(images))
        draws = MixupDraws(*(draw[rank::world_size] for draw in draws))
        local.append(one_process(scenario, images, target, draws))
    expected = {
        name: torch.stack([rank['gradients'][name] for rank in local]).mean(dim=0) for name in local[0]['gradients']
    }
    for rank, alone in zip(ranks, local, strict=True):
        assert relative_error(rank['gradients'], expected) < 1e-10
        assert rank['losses'] == pytest.approx(alone['losses'], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('name', NEGATIVE_CONTROLS)
def test_a_backward_that_forgets_the_other_ranks_is_noticed(name, found):
    scenario, ranks = SCENARIOS[name], found(name)
    expected = one_process(scenario, *read_by_one_process(scenario))
    assert relative_error(ranks[0]['gradients'], expected['gradients']) > 1e-3
    assert mean_losses(ranks) == pytest.approx(expected['losses'], rel=1e-12)  # the forward is right


@pytest.mark.slow
def test_gathering_makes_a_difference(found):
    gathered, alone = found('equal batches'), found('not gathered')
    assert relative_error(gathered[0]['gradients'], alone[0]['gradients']) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('name', SCENARIOS)
def test_generators_of_all_ranks_stay_in_step(name, found):
    states = [rank['generator'] for rank in found(name)]
    untouched = make_task(SCENARIOS[name]).criterion.mixup.generator.get_state()
    assert all(torch.equal(state, states[0]) for state in states)
    assert torch.equal(states[0], untouched) == (not SCENARIOS[name].mixup_enabled)


@pytest.mark.parametrize('sizes', [[4], [4, 4], [5, 3], [4, 1, 3]], ids=str)
def test_own_rows_of_all_ranks_are_the_rows_of_the_global_batch(sizes):
    batches = [GlobalBatch(rank, sizes) for rank in range(len(sizes))]
    rows = torch.cat([batch.own_rows(torch.device('cpu')) for batch in batches])
    assert rows.tolist() == list(range(sum(sizes)))
    assert {batch.num_rows for batch in batches} == {sum(sizes)}
    label, per_row = torch.randint(3, (sum(sizes),)), torch.randn(sum(sizes), dtype=torch.float64)
    shares = [batch.mean(per_row[batch.own_rows(torch.device('cpu'))].sum(), label) for batch in batches]
    torch.testing.assert_close(sum(shares) / len(sizes), per_row.mean())


@pytest.mark.parametrize('sizes', [[4, 4], [2, 2, 2], [5, 3], [4, 0, 3]], ids=str)
def test_rows_in_reading_order_are_dealt_out_one_to_each_process_in_turn(sizes):
    order = GlobalBatch(0, sizes).reading_order(torch.device('cpu')).tolist()
    owner = [(row, rank) for rank, size in enumerate(sizes) for row in range(size)]
    assert [owner[row] for row in order] == sorted(owner)
    assert GlobalBatch(0, [7]).reading_order(torch.device('cpu')) is None


def test_one_process_gathers_its_own_rows_without_a_process_group():
    x = torch.randn(3, 2, requires_grad=True)
    batch = GlobalBatch.create(3, gather=True, uneven=True)
    assert (batch.rank, batch.sizes) == (0, [3])
    assert batch.gather(x) is x
