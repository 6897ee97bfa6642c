"""Two processes in the loops of other libraries make the update of one plain process with the whole batch"""

from importlib.util import find_spec

import pytest
import torch
from loops_worker import (
    LEARNING_RATE,
    LOOPS,
    NUM_PROCESSES,
    TARGET,
    create_criterion,
    create_timm_model,
    create_transformers_model,
    images,
    state_of,
)
from ranks import launch_ranks

# not imported here, which takes long
HAS_LIBRARIES = all(find_spec(name) for name in ('transformers', 'lightning'))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_LIBRARIES, reason='needs transformers and lightning')]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return launch_ranks('loops_worker.py', NUM_PROCESSES, tmp_path_factory.mktemp('ranks'))


def plain_update(name, order):
    """The state of model and loss after an update by hand, of all images in an order."""
    input, target = images()[order], TARGET[order]
    if name == 'transformers':
        model, criterion = create_transformers_model(), create_criterion(8)
        features = model.vit(input).last_hidden_state[:, 0]
        loss = criterion(features, model.classifier(features), target)
    else:
        model = create_timm_model()
        criterion = create_criterion(model)
        features = model.forward_head(model.forward_features(input), pre_logits=True)
        loss = criterion(features, model.head(features), target)
    loss.backward()
    before = state_of(model, criterion)
    with torch.no_grad():
        for p in [*model.parameters(), *criterion.parameters()]:
            p -= LEARNING_RATE * p.grad
    return before, state_of(model, criterion), model


@pytest.mark.parametrize('name', LOOPS)
def test_the_update_is_that_of_one_process(found, name):
    order = torch.arange(len(TARGET))
    if name == 'transformers':  # its processes take whole batches in turn, and draws go to images in turn
        order = torch.stack([rank[name].pop('seen') for rank in found], dim=1).flatten()
        assert order.sort().values.tolist() == list(range(len(TARGET)))
    before, expected, model = plain_update(name, order)
    for rank in found:
        val_loss = rank[name].pop('val_loss', None)
        assert rank[name].keys() == expected.keys()
        for key, value in expected.items():
            gradient, right = ((before[key] - x) / LEARNING_RATE for x in (rank[name][key], value))
            torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-6, msg=key)
        if val_loss is not None:  # of all images, from both processes
            right = torch.nn.functional.cross_entropy(model(images()), TARGET)
            torch.testing.assert_close(val_loss, right, rtol=1e-4, atol=1e-5, check_dtype=False)
    moved = max((before[key] - value).abs().max() for key, value in expected.items() if 'projector' in key)
    assert moved > 1e-4
