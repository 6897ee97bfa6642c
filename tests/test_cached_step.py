"""A cached step has the gradients of one graph, in one process and in two, and the memory of one chunk"""

import weakref

import pytest
import torch
import torch.nn as nn
from cached_steps import (
    LABEL,
    SCENARIOS,
    assert_near,
    backward_in_one_graph,
    batch,
    buffers,
    gradients,
    make_task,
)
from ranks import launch_ranks
from tasks import create_task
from timm.task import ClassificationTask

from timm_coretune import CachedStep, SegmentationTask, create_segmentation_model
from timm_coretune.loss.parts.bank import Bank

DROPPING = SCENARIOS['vit, drop path and dropout']
WITHOUT_RANDOMNESS = ('vit', 'resnet, BatchNorm in evaluation mode', 'classifier of two layers', 'nothing mixed, scl')


@pytest.mark.parametrize('name', SCENARIOS)
def test_gradients_are_those_of_one_graph(name):
    task, reference = make_task(SCENARIOS[name]), make_task(SCENARIOS[name])
    step = CachedStep(task, chunk_size=5)  # the last chunk has 2 images
    for seed in (1, 2):  # without an update between them, so that gradients accumulate
        images, target = batch(seed)
        torch.manual_seed(seed)
        result = step(images, target)
        after = torch.rand(3)
        torch.manual_seed(seed)
        expected = backward_in_one_graph(reference, images.split(5), target)
        assert torch.equal(after, torch.rand(3))
        assert result.keys() == expected.keys()
        assert not any(value.requires_grad for value in result.values())
        assert_near(result, expected)
        assert_near(gradients(task), gradients(reference))
        assert_near(buffers(task), buffers(reference))
    assert torch.equal(task.criterion.generator.get_state(), reference.criterion.generator.get_state())


@pytest.mark.parametrize('name', WITHOUT_RANDOMNESS)
def test_gradients_are_those_of_the_big_batch(name):
    task, reference = make_task(SCENARIOS[name]), make_task(SCENARIOS[name])
    images, target = batch()
    result = CachedStep(task, chunk_size=4)(images, target)
    expected = reference(images, target)
    expected['loss'].backward()
    assert_near(result, {name: value.detach() for name, value in expected.items()})
    assert_near(gradients(task), gradients(reference))


def test_a_list_of_batches_and_a_batch_in_parts_are_the_same_step():
    images, target = batch()
    whole, listed, cut = (make_task(SCENARIOS['vit']) for _ in range(3))
    CachedStep(whole, chunk_size=4)(images, target)
    CachedStep(listed)(images.split(4), target.split(4))
    CachedStep(cut, chunk_size=4)(images.split(8), target)
    for task in (listed, cut):
        assert all(torch.equal(gradients(task)[name], value) for name, value in gradients(whole).items())


def test_patches_in_a_dictionary_are_cut_into_chunks():
    task, reference = make_task(SCENARIOS['vit']), make_task(SCENARIOS['vit'])
    images, target = batch()
    seen = []

    def of_patches(model):
        forward = model.forward
        model.forward = lambda x: seen.append((x['patch_size'], len(x['patches']))) or forward(x['patches'])

    for each in (task, reference):
        of_patches(each.trainable_module.model)
    patches = {'patches': images, 'patch_size': (16, 16)}
    result = CachedStep(task, chunk_size=8)(patches, target)
    assert seen == [((16, 16), 8), ((16, 16), 4)] * 2
    reference(patches, target)['loss'].backward()
    assert result['output'].shape == (12, 4)
    assert_near(gradients(task), gradients(reference))


def test_statistics_of_batch_norm_are_updated_once():
    task, reference = make_task(SCENARIOS['resnet']), make_task(SCENARIOS['resnet'])
    images, target = batch()
    CachedStep(task, chunk_size=4)(images, target)
    for chunk in images.split(4):
        reference.trainable_module.model(chunk)
    found, expected = buffers(task), buffers(reference)
    counts = {int(value) for name, value in found.items() if name.endswith('num_batches_tracked')}
    assert counts == {3}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_buffer_that_the_forward_pass_uses_is_replayed():
    def with_spectral_norm():
        task = make_task(SCENARIOS['vit'])
        torch.manual_seed(3)
        nn.utils.parametrizations.spectral_norm(task.trainable_module.model.blocks[0].mlp.fc1)
        return task

    task, reference = with_spectral_norm(), with_spectral_norm()
    images, target = batch()
    CachedStep(task, chunk_size=4)(images, target)
    backward_in_one_graph(reference, images.split(4), target)
    assert_near(gradients(task), gradients(reference))
    assert_near(buffers(task), buffers(reference))


def test_random_numbers_of_the_loss_are_not_drawn_again_in_the_next_step():
    task, reference = make_task(DROPPING), make_task(DROPPING)
    images, target = batch()
    for each in (task, reference):
        each.criterion.projector.act = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))
    step = CachedStep(task, chunk_size=6)
    for run in (lambda: step(images, target), lambda: backward_in_one_graph(reference, images.split(6), target)):
        torch.manual_seed(1)
        run()
        run()
    assert_near(gradients(task), gradients(reference))


def test_a_scaled_loss_scales_all_gradients():
    task, reference = make_task(DROPPING), make_task(DROPPING)
    images, target = batch()
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    torch.manual_seed(1)
    result = CachedStep(task, chunk_size=6)(images, target, lambda loss: scaler.scale(loss).backward())
    torch.manual_seed(1)
    expected = backward_in_one_graph(reference, images.split(6), target)
    assert_near(result, expected)
    assert_near(gradients(task), {name: 1024 * value for name, value in gradients(reference).items()})
    scaler.unscale_(torch.optim.SGD(task.trainable_module.parameters(), lr=0.1))
    assert_near(gradients(task), gradients(reference))


def test_autocast_around_a_step_holds_for_all_passes():
    task, reference = make_task(DROPPING), make_task(DROPPING)
    images, target = batch()
    for each in (task, reference):
        each.trainable_module.float()
    dtypes = []
    task.criterion.projector.fc1.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.manual_seed(1)
        result = CachedStep(task, chunk_size=4)(images.float(), target)
        torch.manual_seed(1)
        expected = backward_in_one_graph(reference, images.float().split(4), target)
    assert result['output'].dtype == dtypes[0] == torch.bfloat16
    assert_near(result, expected, tolerance=0.01)
    assert_near(gradients(task), gradients(reference), tolerance=0.02)


def test_no_two_chunks_are_in_memory_at_once():
    images, target = batch()

    def greatest_memory(run) -> int:
        """Most bytes that graphs keep at once, beside parameters."""
        kept, most = [0], [0]

        class Kept:
            def __init__(self, x):
                self.x = x
                self.size = x.numel() * x.element_size() if not isinstance(x, nn.Parameter) else 0
                kept[0] += self.size
                most[0] = max(most[0], kept[0])
                weakref.finalize(self, lambda size=self.size: kept.__setitem__(0, kept[0] - size))

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            run()
        return most[0]

    def plain(task, count):
        task(images[:count], target[:count])['loss'].backward()

    of_chunk, of_batch = (greatest_memory(lambda c=c: plain(make_task(SCENARIOS['resnet']), c)) for c in (4, 12))
    cached = greatest_memory(lambda: CachedStep(make_task(SCENARIOS['resnet']), chunk_size=4)(images, target))
    assert of_batch > 2.5 * of_chunk
    assert cached < 1.05 * of_chunk


def test_images_that_wait_as_bytes_are_prepared_one_chunk_at_a_time():
    task, reference = make_task(DROPPING), make_task(DROPPING)
    _, target = batch()
    stored = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    alive, sizes = [], []

    def prepare(chunk):
        assert not any(kept() is not None for kept in alive)
        noise = torch.rand(len(chunk), 1, 1, 1, dtype=torch.float64)  # the same in both passes
        images = (chunk.double() - 120) / 60 + noise
        alive.append(weakref.ref(images))
        sizes.append(len(chunk))
        return images

    forward = reference.trainable_module.model.forward_features
    torch.manual_seed(1)
    result = CachedStep(task, chunk_size=5, prepare=prepare)(stored, target)
    assert sizes == [5, 5, 2] * 2
    # in one graph, in which the model prepares what it gets
    alive.clear()
    reference.trainable_module.model.forward_features = lambda chunk: forward(
        (chunk.double() - 120) / 60 + torch.rand(len(chunk), 1, 1, 1, dtype=torch.float64)
    )
    torch.manual_seed(1)
    expected = backward_in_one_graph(reference, stored.split(5), target)
    assert_near(result, expected)
    assert_near(gradients(task), gradients(reference))


def test_images_that_are_prepared_differently_each_time_are_noticed():
    calls = []
    step = CachedStep(make_task(SCENARIOS['vit']), chunk_size=6, prepare=lambda x: calls.append(0) or x * len(calls))
    with pytest.raises(RuntimeError, match='prepare gives other images each time'):
        step(*batch())


@pytest.mark.parametrize('method', ['l2-sp', 'bi-tuning', 'dr-tune', 'ldifs'])
def test_a_loss_that_needs_more_than_features_and_logits_is_refused(method):
    with pytest.raises(ValueError, match='Loss: it (penalises|runs|compares) .* Accumulate gradients instead'):
        CachedStep(create_task(criterion=method), chunk_size=4)


def test_a_model_with_a_bank_is_refused():
    task = make_task(SCENARIOS['vit'])
    task.trainable_module.model.remembered = Bank(4, {'feature': 3})
    with pytest.raises(ValueError, match='model without a Bank'):
        CachedStep(task, chunk_size=4)


@pytest.mark.parametrize('kind', ['segmentation', 'plain'])
def test_other_tasks_are_refused(kind):
    if kind == 'plain':
        task = ClassificationTask(nn.Linear(2, 2), nn.CrossEntropyLoss(), verbose=False)
    else:
        task = SegmentationTask(create_segmentation_model('test_resnet', 3, img_size=(64, 64)), verbose=False)
    with pytest.raises(TypeError, match=f'got a {type(task).__name__}. Accumulate'):
        CachedStep(task, chunk_size=4)


def test_a_model_that_keeps_state_outside_of_buffers_is_noticed_in_the_first_step():
    task, passes = make_task(SCENARIOS['vit']), []
    # fades with every pass, by a number that is in no buffer
    task.trainable_module.model.norm.register_forward_hook(
        lambda module, args, output: passes.append(0) or output * 0.9 ** len(passes)
    )
    with pytest.raises(RuntimeError, match='same features in both forward passes of a chunk, got a difference of'):
        CachedStep(task, chunk_size=6)(*batch())


def test_wrong_calls_say_what_was_expected():
    images, target = batch()
    task = make_task(SCENARIOS['vit'])
    with pytest.raises(ValueError, match='chunk_size >= 1, the images of a forward pass, got 0'):
        CachedStep(task, chunk_size=0)
    with pytest.raises(ValueError, match='Expected a list of chunks, since chunk_size is None, got one batch'):
        CachedStep(task)(images, target)
    with pytest.raises(ValueError, match=r'got \(11,\)'):
        CachedStep(task, chunk_size=4)(images, target[:11])
    task.eval()
    with pytest.raises(RuntimeError, match=r'training mode.*task\.train\(\)'):
        CachedStep(task, chunk_size=4)(images, target)


def test_a_frozen_backbone_gets_no_gradient_and_the_rest_that_of_one_graph():
    task, reference = make_task(SCENARIOS['vit']), make_task(SCENARIOS['vit'])
    images, target = batch()
    for each in (task, reference):
        each.trainable_module.model.requires_grad_(False)
        each.trainable_module.model.head.requires_grad_(True)
    CachedStep(task, chunk_size=6)(images, target)
    backward_in_one_graph(reference, images.split(6), target)
    assert gradients(task)['model.norm.weight'] is None
    assert_near(gradients(task), gradients(reference))


@pytest.mark.parametrize('kind', ['unknown', 'sharded'])
def test_wrappers_that_do_not_reduce_the_gradients_of_the_loss_are_refused(monkeypatch, kind):
    task = make_task(SCENARIOS['vit'])
    if kind == 'unknown':
        monkeypatch.setattr('timm_coretune.cached_step.process_index_and_count', lambda: (0, 2))
        task.trainable_module = nn.DataParallel(task.trainable_module)
    else:  # parameters that FSDP2 shards are DTensors
        task.trainable_module.model.norm.weight.device_mesh = None
    with pytest.raises(ValueError, match='Expected a module in DistributedDataParallel, or in no wrapper, got'):
        CachedStep(task, chunk_size=6)(*batch())


@pytest.mark.slow
def test_a_compiled_step_drops_the_same_in_both_passes():
    task, reference = make_task(DROPPING), make_task(DROPPING)
    images, target = batch()
    for each in (task, reference):
        each.trainable_module.model.blocks = each.trainable_module.model.blocks[:1]
    task.compile('aot_eager')
    torch.manual_seed(1)
    CachedStep(task, chunk_size=4)(images, target)
    torch.manual_seed(1)
    backward_in_one_graph(reference, images.split(4), target)
    found = {name.removeprefix('_orig_mod.'): value for name, value in gradients(task).items()}
    assert_near(found, gradients(reference))


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return launch_ranks('cached_step_worker.py', 2, tmp_path_factory.mktemp('ranks'))


@pytest.mark.slow
def test_two_processes_have_the_mean_of_the_gradients_of_one_graph(ranks):
    assert all(len(found) >= 6 for found in ranks)
    for rank in ranks:
        for steps in rank.values():
            for step in steps:
                for kind in ('losses', 'gradients', 'buffers'):
                    assert_near(step[kind], step[f'expected {kind}'])


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_batch_of_both(ranks):
    # the images of a rank are neighbours there; one process reads those of both in turn
    images, target = batch(seed=0)
    in_turn = torch.arange(len(LABEL)).view(2, -1).T.flatten()
    reference = make_task(SCENARIOS['vit'])
    reference(images[in_turn], target[in_turn])['loss'].backward()
    for rank in ranks:
        assert_near(rank['vit'][0]['gradients'], gradients(reference))
