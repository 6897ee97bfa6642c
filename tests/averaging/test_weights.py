"""Averages of tensors against plain loops in float64"""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from timm_coretune import average_weights
from timm_coretune.averaging.choosing import Chooser, greedy_soup
from timm_coretune.averaging.weights import StoredState

EPSILON = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def states_of(dtype, count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            'conv.weight': torch.randn(4, 3, 2, 2, generator=generator).to(dtype),
            'scale': torch.randn((), generator=generator).to(dtype),
            'steps': torch.tensor(10 * number),
            'mask': torch.tensor([number == 1, True]),
        }
        for number in range(count)
    ]


def by_loops(tensors, weights):
    """Element by element in Python's floats, which have 64 bits."""
    arrays = [tensor.double().numpy() for tensor in tensors]
    out = np.zeros(arrays[0].shape)
    for place in itertools.product(*map(range, out.shape)):
        for array, weight in zip(arrays, weights, strict=True):
            out[place] += weight * float(array[place])
    return out


@pytest.mark.parametrize('dtype', EPSILON, ids=str)
@pytest.mark.parametrize('weights', [None, (0.2, 0.5, 0.3)], ids=['uniform', 'given'])
@pytest.mark.parametrize('stored', [False, True], ids=['in-memory', 'stored'])
def test_an_average_is_that_of_loops(tmp_path, dtype, weights, stored):
    states = states_of(dtype)
    if stored:
        for number, state in enumerate(states):
            save_file(state, tmp_path / f'{number}.safetensors')
        states = [StoredState(tmp_path / f'{number}.safetensors') for number in range(3)]
    found = average_weights(states, weights)
    assert list(found) == list(states[0])
    for name in ('conv.weight', 'scale'):
        expected = by_loops([state[name] for state in states], weights or [1 / 3] * 3)
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name].double().numpy(), expected, EPSILON[dtype], EPSILON[dtype])
    heaviest = 0 if weights is None else 1
    assert found['steps'].item() == 10 * heaviest
    assert found['mask'].tolist() == [heaviest == 1, True]


def test_weight_one_and_equal_tensors_keep_every_bit_and_weight_zero_has_no_part():
    states = states_of(torch.float32)
    states[1]['scale'] = torch.tensor(float('nan'))
    found = average_weights(states, [0.0, 0.0, 1.0])
    assert all(torch.equal(found[name], states[2][name]) for name in found)
    found['conv.weight'].zero_()
    assert states[2]['conv.weight'].any()
    odd = torch.full((1000,), 0.1) * torch.arange(1000)
    assert torch.equal(average_weights([{'x': odd}, {'x': odd.clone()}], [0.3, 0.7])['x'], odd)


@pytest.mark.parametrize(
    'change, weights, message',
    [
        ({}, [0.5, 0.6], 'sum to 1, got .0.5, 0.6.'),
        ({}, [1.5, -0.5], 'weights of 0 to 1'),
        ({}, [1.0], 'got 1 for 2'),
        ({'steps': None}, None, 'differ in steps. Average models of the same architecture'),
        ({'scale': torch.zeros(2)}, None, r'shape of scale in all states, got \(\) and \(2,\) in state 1'),
    ],
    ids=['sum', 'negative', 'count', 'missing', 'shape'],
)
def test_states_that_have_no_average_are_refused(change, weights, message):
    first, second = states_of(torch.float32, 2)
    second = {name: change.get(name, tensor) for name, tensor in second.items()}
    second = {name: tensor for name, tensor in second.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        average_weights([first, second], weights)


class OnALine:
    """A validation of a model of one weight, which is best at 5."""

    metric = 'top1'

    def __init__(self):
        self.model = torch.nn.Linear(1, 1, bias=False)

    def __call__(self, state, num_images):
        assert num_images == 0  # there is no BatchNorm
        self.model.load_state_dict(state)
        return {'top1': 100 - (self.model.weight.item() - 5) ** 2}


@pytest.mark.parametrize('values', [(4, 9, 5.5), (9, 1, 4.9), (5, 5, 5), (0, 20), (1, 9.5, 3, 7)], ids=str)
def test_a_greedy_soup_takes_what_an_enumeration_takes(values):
    order = sorted(values, key=lambda value: abs(value - 5))
    taken = order[:1]
    for value in order[1:]:
        if abs(np.mean([*taken, value]) - 5) <= abs(np.mean(taken) - 5):
            taken.append(value)
    chooser = Chooser(OnALine(), num_images=100)
    what = greedy_soup(chooser, [{'weight': torch.tensor([[float(v)]])} for v in values], list(map(str, values)))
    assert chooser.state['weight'].item() == pytest.approx(np.mean(taken))
    assert chooser.rows[chooser.best].scores['top1'] == pytest.approx(100 - (np.mean(taken) - 5) ** 2)
    assert len(chooser.rows) == 2 * len(values) - 1
    assert what.startswith('the weights of' if len(taken) == 1 else f'the mean of the weights of {taken[0]}')
