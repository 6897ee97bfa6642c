"""Random draws where torch transforms the loss: recomputed in a backward pass, compiled, copied"""

import copy
import gc
import weakref

import pytest
import torch
from compiling import needs_generators_in_graphs
from losses import WIDTH, make_classifier, make_criterion
from reference import random_features, random_label
from torch.utils.checkpoint import checkpoint

from timm_coretune import mine_hard_pairs
from timm_coretune.distributed import GlobalBatch

TARGET = random_label(0, 12, 4)


def batch():
    features = (random_features(1, 12, WIDTH) * 0.2).requires_grad_()
    return features, make_classifier(4)(features), TARGET


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_draws_that_a_recomputation_would_repeat_otherwise_are_refused(use_reentrant):
    criterion = make_criterion()
    features, logits, target = batch()
    loss = checkpoint(criterion, features, logits, target, use_reentrant=use_reentrant)
    state = criterion.generator.get_state()
    with pytest.raises(RuntimeError, match=r'torch\.utils\.checkpoint recomputes.*prepared = criterion\.prepare'):
        loss.backward()
    assert torch.equal(criterion.generator.get_state(), state)


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_with_draws_made_before_a_recomputation_gives_the_same_gradient(use_reentrant):
    criterion = make_criterion(contrast_weight=1.0)
    expected = criterion(*(arguments := batch()))
    (expected_gradient,) = torch.autograd.grad(expected, arguments[0])
    again, (features, logits, target) = make_criterion(contrast_weight=1.0), batch()
    prepared = again.prepare(len(features), features.device)
    loss = checkpoint(
        lambda *args: again.compute(*args)['loss'], features, logits, target, *prepared, use_reentrant=use_reentrant
    )
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(features.grad, expected_gradient)


def test_other_draws_from_a_generator_are_refused_in_a_backward_pass_too():
    criterion, generator, refused = make_criterion(), torch.Generator(), []
    features = random_features(1, 12, WIDTH)

    def draw_again(grad):
        for draw in (
            lambda: criterion.draw_image_seeds(GlobalBatch(0, [12]), features.device),
            lambda: mine_hard_pairs(features, TARGET, generator),
            lambda: criterion.mixup(features, torch.nn.functional.one_hot(TARGET).double()),
        ):
            with pytest.raises(RuntimeError, match='random numbers to be drawn once'):
                draw()
            refused.append(draw)
        mine_hard_pairs(features, TARGET)  # by the global generator, which torch restores

    x = torch.ones(2, requires_grad=True)
    (y := x * 2).register_hook(draw_again)
    y.sum().backward()
    assert len(refused) == 3


@needs_generators_in_graphs
@pytest.mark.parametrize('soft', [False, True], ids=['class indices', 'soft targets'])
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_the_loss_compiles_to_one_graph_that_draws_what_an_eager_one_draws(backend, soft):
    torch._dynamo.reset()
    eager, criterion = make_criterion(contrast_weight=1.0), make_criterion(contrast_weight=1.0)
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    seen = []
    for _ in range(2):
        features, logits, target = batch()
        target = torch.nn.functional.one_hot(target).double() if soft else target
        losses = [compiled(features, logits, target), eager(features, logits, target)]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
        gradients = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
        assert torch.equal(criterion.generator.get_state(), eager.generator.get_state())
        seen.append(losses[0].item())
    assert seen[0] != seen[1]
    if not soft:
        with pytest.raises(RuntimeError, match=r'in \[0, 3\], got others.*start at 0'):
            compiled(features, logits, target + 1)


@needs_generators_in_graphs
@pytest.mark.slow
def test_two_draws_in_one_graph_are_different():
    torch._dynamo.reset()
    criterion, (features, logits, target) = make_criterion(), batch()

    @torch.compile(fullgraph=True, backend='aot_eager')
    def twice():
        return criterion(features, logits, target), criterion(features, logits, target)

    eager = make_criterion()
    expected = [eager(features, logits, target) for _ in range(2)]
    torch.testing.assert_close(list(twice()), expected, rtol=1e-10, atol=0)
    assert expected[0] != expected[1]


@needs_generators_in_graphs
def test_a_compiled_copy_draws_from_its_own_generator():
    torch._dynamo.reset()
    criterion = make_criterion()
    duplicate, state = copy.deepcopy(criterion), criterion.generator.get_state()
    loss = torch.compile(duplicate, fullgraph=True, backend='eager')(*batch())
    assert torch.equal(criterion.generator.get_state(), state)
    torch.testing.assert_close(loss, criterion(*batch()), rtol=1e-10, atol=0)
    assert torch.equal(criterion.generator.get_state(), duplicate.generator.get_state())


def test_that_graphs_can_draw_keeps_no_loss_alive():
    mixup = weakref.ref((criterion := make_criterion()).mixup)
    del criterion
    gc.collect()
    assert mixup() is None


def test_the_loss_maps_over_labels():
    features, logits, _ = batch()
    labels = torch.stack([random_label(seed, 12, 4) for seed in range(3)])
    criterion = make_criterion()
    draws = copy.deepcopy(criterion).prepare(12, features.device)
    mapped = torch.func.vmap(lambda label: criterion(features, logits, label), randomness='same')(labels)
    for loss, label in zip(mapped, labels, strict=True):
        torch.testing.assert_close(loss, criterion.compute(features, logits, label, *draws)['loss'])
