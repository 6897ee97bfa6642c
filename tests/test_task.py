"""CoreTuningTask is a timm TrainingTask like any other.

Protected here: one pass through an unchanged backbone, the losses of CoreTuningLoss, plain timm weights for evaluation
and in checkpoints, exact resume, parameter groups of the plain model, one graph, and no synchronisation with a device.
"""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from timm_coretune import CoreTuningLoss, CoreTuningTask
from timm_coretune.distributed import GlobalBatch
from timm_coretune.task import CoreTuningModule

NUM_CLASSES = 4
IMAGE_SIZE = 64  # leaves 2 x 2 after a stride of 32, so that BatchNorm trains on one image
FAMILIES = ('test_resnet', 'test_efficientnet', 'test_vit')
TARGET = torch.tensor([0, 1, 0, 2, 1, 0])
BATCH_SIZE = 6


def create_model(name='test_resnet', num_classes=NUM_CLASSES, seed=0, **kwargs):
    torch.manual_seed(seed)
    if name == 'test_vit':
        kwargs.setdefault('img_size', IMAGE_SIZE)
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def create_task(model=None, seed=0, **kwargs):
    model = create_model() if model is None else model
    torch.manual_seed(seed)
    return CoreTuningTask(model, verbose=False, **kwargs)


def images(batch_size=BATCH_SIZE, seed=1):
    return torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def step(task, input, target, optimizer):
    result = task(input, target)
    optimizer.zero_grad()
    result['loss'].backward()
    optimizer.step()
    return result


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def count_calls(model):
    """Calls of every module without children, counted from now on."""
    calls = {name: 0 for name, module in model.named_modules() if not list(module.children())}

    def count(name):
        def hook(module, args, output):
            calls[name] += 1

        return hook

    for name in calls:
        model.get_submodule(name).register_forward_hook(count(name))
    return calls


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


# forward


@pytest.mark.parametrize('name', FAMILIES)
def test_output_is_the_logits_of_the_plain_model_in_training_mode(name):
    model = create_model(name, drop_rate=0.3, drop_path_rate=0.1)
    plain = copy.deepcopy(model).train()
    task = create_task(model)
    torch.manual_seed(5)
    output = task(images(), TARGET)['output']
    torch.manual_seed(5)
    expected = plain(images())
    assert torch.equal(output, expected)
    torch.manual_seed(6)
    assert not torch.equal(output, plain(images()))  # the random numbers did matter


@pytest.mark.parametrize('contrast_weight', [0.1, 0.7, 0.0])
@pytest.mark.parametrize('name', FAMILIES)
def test_losses_are_those_of_the_criterion_applied_by_hand(name, contrast_weight):
    task = create_task(create_model(name), contrast_weight=contrast_weight, label_smoothing=0.1)
    model, criterion = copy.deepcopy(task.get_eval_model()).train(), copy.deepcopy(task.criterion)
    result = task(images(), TARGET)
    features = model.forward_head(model.forward_features(images()), pre_logits=True)
    expected = criterion.losses(features, model.get_classifier()(features), TARGET)
    assert set(result) == {*expected, 'output'}
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, msg=key)
    weighted = contrast_weight * result['contrast_loss'] if contrast_weight else 0.0
    torch.testing.assert_close(result['loss'], result['task_loss'] + weighted)


@pytest.mark.parametrize('name', [*FAMILIES, 'mobilenetv3_small_050'])
def test_a_step_runs_every_layer_as_often_as_the_plain_model(name):
    model = create_model(name)  # the head of MobileNetV3 has a convolution, which two calls of it would pay twice
    task = create_task(model)
    expected = count_calls(plain := copy.deepcopy(model).train())
    plain(images())
    calls = count_calls(model)
    task(images(), TARGET)['loss'].backward()
    assert calls == expected
    assert max(calls.values()) == 1
    tracked = {key: int(value) for key, value in model.state_dict().items() if key.endswith('num_batches_tracked')}
    assert set(tracked.values()) == (set() if name == 'test_vit' else {1})


def test_every_parameter_of_model_and_projector_gets_a_gradient():
    task = create_task()
    task(images(), TARGET)['loss'].backward()
    grads = gradients(task.trainable_module)
    assert [name for name, grad in grads.items() if grad is None] == []
    ends = (
        'model.conv1.0.weight',
        'model.fc.weight',
        'criterion.projector.fc1.weight',
        'criterion.projector.fc2.weight',
    )
    assert [name for name in ends if not grads[name].any()] == []


def test_weight_zero_has_no_projector_and_no_contrast_loss():
    task = create_task(contrast_weight=0.0)
    assert task.criterion.projector is None
    assert list(task.criterion.parameters()) == []
    result = task(images(), TARGET)
    assert set(result) == {'loss', 'task_loss', 'output'}
    assert torch.equal(result['loss'], result['task_loss'])
    assert set(task.get_checkpoint_state()['task_state']) == {'generator'}


def test_clearing_mixup_enabled_leaves_clean_images_and_draws_nothing():
    task = create_task()
    mixed = task(images(), TARGET)
    task.criterion.mixup.mixup_enabled = False
    state = task.criterion.mixup.generator.get_state()
    clean = task(images(), TARGET)
    assert torch.equal(task.criterion.mixup.generator.get_state(), state)
    torch.testing.assert_close(clean['task_loss'], torch.nn.functional.cross_entropy(clean['output'], TARGET))
    assert clean['task_loss'] != mixed['task_loss']
    assert clean['contrast_loss'] != mixed['contrast_loss']


def test_two_steps_draw_different_mixtures():
    task = create_task(create_model('test_vit'))
    first, second = task(images(), TARGET), task(images(), TARGET)
    assert torch.equal(first['output'], second['output'])
    assert first['task_loss'] != second['task_loss']


def test_pixel_mixup_may_run_in_front():
    task = create_task()
    model, criterion = copy.deepcopy(task.get_eval_model()).train(), copy.deepcopy(task.criterion)
    input, target = Mixup(mixup_alpha=0.4, num_classes=NUM_CLASSES, label_smoothing=0.0)(images(), TARGET)
    result = task(input, target)
    result['loss'].backward()
    features = model.forward_head(model.forward_features(input), pre_logits=True)
    torch.testing.assert_close(result['loss'], criterion(features, model.get_classifier()(features), target))


def test_one_hot_targets_give_the_losses_of_class_indices():
    one_hot = torch.nn.functional.one_hot(TARGET, NUM_CLASSES).float()
    hard, soft = create_task()(images(), TARGET), create_task()(images(), one_hot)
    for key in hard:
        torch.testing.assert_close(hard[key], soft[key], msg=key)


@pytest.mark.parametrize(
    'target, num_classes',
    [([0], 1), ([2], NUM_CLASSES), ([0, 0, 0], 1), ([1, 1, 1], NUM_CLASSES), ([0, 1], 2)],
    ids=['one image of one class', 'one image', 'one class in all', 'one class in the batch', 'no positives'],
)
def test_degenerate_batches_train(target, num_classes):
    task = create_task(create_model(num_classes=num_classes))
    result = task(images(len(target)), torch.tensor(target))
    result['loss'].backward()
    assert result['output'].shape == (len(target), num_classes)
    assert all(result[key].isfinite() for key in ('loss', 'task_loss', 'contrast_loss'))
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(task.trainable_module).values())


# dtypes and memory formats


def test_channels_last_changes_nothing_but_the_strides():
    expected = create_task()(images(), TARGET)
    task = create_task(create_model().to(memory_format=torch.channels_last))
    result = task(images().contiguous(memory_format=torch.channels_last), TARGET)
    result['loss'].backward()
    assert task.get_eval_model().conv1[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
    for key in expected:
        torch.testing.assert_close(result[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize('name', FAMILIES)
def test_losses_under_bfloat16_autocast_are_float32_and_near(name):
    expected = create_task(create_model(name))(images(), TARGET)
    task = create_task(create_model(name))
    with torch.autocast('cpu', torch.bfloat16):
        result = task(images(), TARGET)
    result['loss'].backward()
    assert result['output'].dtype == torch.bfloat16
    for key in ('loss', 'task_loss', 'contrast_loss'):
        assert result[key].dtype == torch.float32
        torch.testing.assert_close(result[key], expected[key], rtol=0.1, atol=0.1, msg=key)
    assert all(grad.dtype == torch.float32 for grad in gradients(task.trainable_module).values())


@pytest.mark.parametrize('name', FAMILIES)
def test_a_bfloat16_model_trains_with_a_bfloat16_projector_and_float32_losses(name):
    expected = create_task(create_model(name))(images(), TARGET)
    task = create_task(create_model(name).to(torch.bfloat16), dtype=torch.bfloat16)
    result = task(images().bfloat16(), TARGET)
    result['loss'].backward()
    assert {p.dtype for p in task.trainable_module.parameters()} == {torch.bfloat16}
    assert result['output'].dtype == torch.bfloat16
    for key in ('loss', 'task_loss', 'contrast_loss'):
        assert result[key].dtype == torch.float32
        torch.testing.assert_close(result[key], expected[key], rtol=0.1, atol=0.1, msg=key)
    assert all(grad.isfinite().all() for grad in gradients(task.trainable_module).values())


# evaluation


@pytest.mark.parametrize('name', FAMILIES)
def test_the_trainable_module_in_evaluation_mode_returns_what_the_model_returns(name):
    task = create_task(create_model(name))
    task(images(), TARGET)  # moves the statistics of BatchNorm
    module = task.get_trainable_module().eval()
    with torch.no_grad():
        expected = task.get_eval_model()(images())
        assert torch.equal(module(images()), expected)
        assert torch.equal(module(images(), TARGET), expected)


def test_the_evaluation_model_is_the_very_model_that_was_passed():
    model = create_model()
    assert create_task(model).get_eval_model() is model


def watch_classifier_input(model):
    """References, that keep nothing alive, to all that the classifier is called with."""
    seen = []
    model.get_classifier().register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    return seen


def test_no_features_outlive_a_step():
    model = create_model()
    task = create_task(model)
    seen = watch_classifier_input(model)
    result = task(images(), TARGET)
    result['loss'].backward()
    del result
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


def test_a_plain_forward_of_the_evaluation_model_keeps_no_features():
    model = create_model()
    task = create_task(model)
    task(images(), TARGET)
    seen = watch_classifier_input(model)
    with torch.no_grad():
        task.get_eval_model().eval()(images())
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


def test_a_deep_copy_trains_on_its_own():
    task = create_task(create_model('mobilenetv3_small_050'))
    module = task.trainable_module
    duplicate = copy.deepcopy(module)
    arguments = (images(), TARGET, *module.criterion.prepare(BATCH_SIZE, TARGET.device))
    calls = count_calls(duplicate.model)
    torch.manual_seed(2)
    actual = duplicate(*arguments)
    actual['loss'].backward()
    assert calls['conv_head'] == 1  # its hook came along
    assert all(grad is None for grad in gradients(module).values())
    torch.manual_seed(2)
    expected = module(*arguments)
    expected['loss'].backward()
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key
    assert_same_state(gradients(duplicate), gradients(module))


# average of weights


def test_the_averaged_evaluation_model_is_a_plain_timm_model_with_averaged_weights():
    task = create_task()
    task.setup_ema(decay=0.75)
    before = copy.deepcopy(task.get_trainable_module().state_dict())
    step(task, images(), TARGET, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.5))
    task.update_ema()
    averaged = task.get_eval_model(ema=True)
    assert type(averaged) is type(create_model())
    assert averaged.state_dict().keys() == create_model().state_dict().keys()
    after = task.get_trainable_module().state_dict()
    of_module = {
        **{'model.' + name: value for name, value in averaged.state_dict().items()},
        **{f'criterion.projector.{k}': v for k, v in task.get_task_state(ema=True)['projector'].items()},
    }
    assert of_module.keys() == before.keys()
    for name, value in of_module.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name], msg=name)
    for name in ('model.conv1.0.weight', 'model.fc.weight', 'model.bn1.running_mean', 'criterion.projector.fc2.weight'):
        assert not torch.equal(before[name], after[name]), name


# checkpoints


@pytest.mark.parametrize('ema', [False, True], ids=['weights', 'average'])
@pytest.mark.parametrize('name', FAMILIES)
def test_checkpoints_hold_exactly_the_weights_of_the_plain_model_and_the_rest_apart(name, ema):
    task = create_task(create_model(name))
    task.setup_ema()
    suffix = '_ema' if ema else ''
    state = task.get_checkpoint_state(ema=ema)
    assert set(state) == {f'state_dict{suffix}', f'task_state{suffix}'}
    assert list(state[f'state_dict{suffix}']) == list(create_model(name).state_dict())
    assert set(state[f'task_state{suffix}']) == {'projector', 'generator'}
    assert set(state[f'task_state{suffix}']['projector']) == {'fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias'}
    create_model(name).load_state_dict(state[f'state_dict{suffix}'], strict=True)


@pytest.mark.parametrize('contrast_weight', [0.1, 0.0])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_a_resumed_run_continues_bit_for_bit(name, contrast_weight, tmp_path):
    def start(seed):
        task = create_task(create_model(name, seed=seed), seed=seed, contrast_weight=contrast_weight)
        optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=1e-3, weight_decay=0.05)
        task.setup_ema(decay=0.9)
        return task, optimizer

    def train(task, optimizer, steps):
        losses = []
        for i in steps:
            losses.append(step(task, images(seed=i), TARGET, optimizer)['loss'].detach())
            task.update_ema(step=i)
        return torch.stack(losses)

    task, optimizer = start(seed=0)
    train(task, optimizer, range(3))
    saver = CheckpointSaver(task.get_eval_model(), optimizer, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=4, metric=1.0)
    expected = train(task, optimizer, range(3, 6))

    resumed, resumed_optimizer = start(seed=9)
    path = str(tmp_path / 'last.pth.tar')
    assert resume_task_checkpoint(resumed, path, resumed_optimizer, weights_only=True) == 5
    load_task_ema_checkpoint(resumed, path, weights_only=True)
    actual = train(resumed, resumed_optimizer, range(3, 6))

    assert torch.equal(actual, expected)
    for ema in (False, True):
        of_resumed, of_first = resumed.get_trainable_module(ema=ema), task.get_trainable_module(ema=ema)
        assert_same_state(of_resumed.state_dict(), of_first.state_dict())
    assert torch.equal(resumed.mixup.generator.get_state(), task.criterion.mixup.generator.get_state())
    state, resumed_state = optimizer.state_dict()['state'], resumed_optimizer.state_dict()['state']
    assert len(state) == len(list(task.get_trainable_module().parameters()))
    assert resumed_state.keys() == state.keys()
    for index in state:
        assert_same_state(resumed_state[index], state[index])


@pytest.mark.parametrize('saved, resumed', [(0.1, 0.0), (0.0, 0.1)], ids=['head too many', 'head missing'])
def test_task_state_that_does_not_fit_is_rejected_when_strict(saved, resumed):
    state = create_task(contrast_weight=saved).get_task_state()
    task = create_task(contrast_weight=resumed)
    with pytest.raises(RuntimeError, match='contrast_weight'):
        task.load_task_state(state)
    task.criterion.mixup.draw(3)
    task.load_task_state(state, strict=False)
    assert torch.equal(task.criterion.mixup.generator.get_state(), state['generator'])


def test_a_checkpoint_without_task_state_keeps_the_projector():
    task = create_task()
    before = copy.deepcopy(task.criterion.projector.state_dict())
    task.load_checkpoint_state(create_model(seed=3).state_dict())
    assert_same_state(task.criterion.projector.state_dict(), before)
    assert_same_state(task.get_eval_model().state_dict(), create_model(seed=3).state_dict())


def test_averaged_task_state_needs_an_average():
    task = create_task()
    assert task.get_task_state(ema=True) == {}
    with pytest.raises(RuntimeError, match='setup_ema'):
        task.load_task_state(task.get_task_state(), ema=True)


# optimizer


@pytest.mark.parametrize(
    'name, classifiers',
    [
        ('test_resnet', ['fc']),
        ('test_efficientnet', ['classifier']),
        ('test_vit', ['head']),
        ('deit_tiny_distilled_patch16_224', ['head', 'head_dist']),
    ],
)
def test_clipping_without_head_leaves_out_the_classifier_and_keeps_the_projector(name, classifiers):
    task = create_task(create_model(name))
    named = dict(task.get_trainable_module().named_parameters())
    names = {id(p): name for name, p in named.items()}
    assert {names[id(p)] for p in task.get_clip_parameters()} == set(named)
    excluded = {f'model.{classifier}.{kind}' for classifier in classifiers for kind in ('weight', 'bias')}
    kept = [names[id(p)] for p in task.get_clip_parameters(exclude_head=True)]
    assert set(kept) == set(named) - excluded
    assert len(kept) == len(named) - len(excluded)
    assert any(name.startswith('criterion.projector.') for name in kept)


def group_options(optimizer):
    keys = ('lr_scale', 'lr', 'weight_decay')
    return {id(p): {k: group.get(k) for k in keys} for group in optimizer.param_groups for p in group['params']}


@pytest.mark.parametrize('layer_decay', [None, 0.7], ids=['no layer decay', 'layer decay'])
@pytest.mark.parametrize('name', [*FAMILIES, 'test_vit3', 'swin_tiny_patch4_window7_224'])
def test_parameter_groups_are_those_of_the_plain_model_and_the_projector_is_a_head(name, layer_decay):
    model = create_model(name)
    task = create_task(model)
    options = dict(opt='adamw', lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    plain = group_options(create_optimizer_v2(model, **options))
    actual = group_options(create_optimizer_v2(task.get_trainable_module(), **options))
    names = {id(p): name for name, p in task.get_trainable_module().named_parameters()}
    assert actual.keys() == names.keys()
    assert {names[i]: actual[i] for i in plain} == {names[i]: plain[i] for i in plain}
    projector = {names[i]: actual[i] for i in actual if i not in plain}
    assert set(projector) == {f'criterion.projector.{p}' for p, _ in task.criterion.projector.named_parameters()}
    for parameter, group in projector.items():
        assert group['weight_decay'] == (0.05 if parameter.endswith('weight') else 0.0)
        assert group['lr_scale'] == (1.0 if layer_decay else None)
    if layer_decay:
        assert len({group['lr_scale'] for group in plain.values()}) > 2


def test_position_embeddings_of_a_transformer_are_not_decayed():
    model = create_model('test_vit')
    task = create_task(model)
    groups = group_options(create_optimizer_v2(task.get_trainable_module(), opt='adamw', weight_decay=0.05))
    assert groups[id(model.pos_embed)]['weight_decay'] == 0.0
    assert groups[id(model.blocks[0].attn.qkv.weight)]['weight_decay'] == 0.05


# several processes


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('contrast_weight', [0.1, 0.0])
def test_distributed_task_synchronises_gradients_but_not_under_no_sync(process_group, contrast_weight):
    alone, task = create_task(contrast_weight=contrast_weight), create_task(contrast_weight=contrast_weight)
    assert task.prepare_distributed() is task
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    task.trainable_module.register_comm_hook(None, hook)
    for _ in range(2):  # parameters without gradient stall the second step
        with task.no_sync():
            task(images(), TARGET)['loss'].backward()
        assert reduced == []
        task(images(), TARGET)['loss'].backward()
        assert sum(reduced) == sum(p.numel() for p in alone.trainable_module.parameters())
        reduced.clear()
        with alone.no_sync():
            alone(images(), TARGET)['loss'].backward()
        alone(images(), TARGET)['loss'].backward()
    actual = gradients(task.trainable_module.module)
    for name, grad in gradients(alone.trainable_module).items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_distributed_task_keeps_plain_names_and_the_plain_evaluation_model(process_group):
    model = create_model()
    task = create_task(model)
    task.setup_ema()
    task.prepare_distributed()
    assert task.get_eval_model() is model
    assert list(task.get_checkpoint_state()['state_dict']) == list(create_model().state_dict())
    assert set(task.get_task_state()) == {'projector', 'generator'}
    assert len(task.get_clip_parameters(exclude_head=True)) == len(list(task.trainable_module.parameters())) - 2
    task(images(), TARGET)['loss'].backward()
    task.update_ema()
    assert type(task.get_eval_model(ema=True)) is type(model)


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


@pytest.mark.parametrize('autocast', [False, True], ids=['float32', 'bfloat16 autocast'])
@pytest.mark.parametrize('soft', [False, True], ids=['class indices', 'soft targets'])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_the_training_step_is_one_graph(name, soft, autocast, fresh_dynamo):
    module = create_task(create_model(name)).get_trainable_module()
    target = torch.nn.functional.one_hot(TARGET, NUM_CLASSES).float() if soft else TARGET
    batch, draws = module.criterion.prepare(BATCH_SIZE, TARGET.device)
    with torch.autocast('cpu', torch.bfloat16) if autocast else nullcontext():
        explained = torch._dynamo.explain(module)(images(), target, batch, draws)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


# errors


def test_a_model_without_classifier_is_rejected():
    with pytest.raises(ValueError, match=r'num_classes > 0, got ResNet with num_classes=0\. Create the model with'):
        create_task(create_model(num_classes=0))


def test_a_module_that_is_no_timm_classifier_is_rejected():
    with pytest.raises(ValueError, match='Expected a timm classifier .* got Linear with num_classes=None'):
        create_task(torch.nn.Linear(2, 2))


def test_a_model_that_does_not_tell_its_width_is_rejected():
    model = create_model()
    model.num_features = model.head_hidden_size = None
    with pytest.raises(ValueError, match=r'ResNet has neither head_hidden_size nor num_features'):
        create_task(model)


def test_criterion_and_its_arguments_are_not_mixed():
    model = create_model()
    criterion = CoreTuningLoss(model.num_features)
    with pytest.raises(ValueError, match=r"not both: \['contrast_weight', 'focal'\]"):
        create_task(model, criterion=criterion, focal=False, contrast_weight=0.3)
    assert create_task(model, criterion=criterion).criterion is criterion


@pytest.mark.parametrize(
    'target, message',
    [
        (torch.tensor([0, 1, 2]), r'class indices \(6,\).* got \(3,\)'),
        (torch.tensor([0, 1, 2, 0, 1, 2, 0]), r'class indices \(6,\).* got \(7,\)'),
        (torch.tensor(1), r'class indices \(6,\).* got \(\)'),
        (torch.full((5, NUM_CLASSES), 0.25), r'soft targets \(6, num_classes\).* got \(5, 4\)'),
        (torch.full((6, 9), 0.1), r'soft targets \(6, 4\).* got \(6, 9\).*num_classes=9'),
        (torch.tensor([0, 1, 2, 3, 4, 0]), r'in \[0, 3\], got 0 to 4'),
        (torch.tensor([0, 1, 2, 3, -1, 0]), r'in \[0, 3\], got -1 to 3'),
        (torch.zeros(6), r'integer dtype, got torch.float32'),
        (torch.zeros(6, NUM_CLASSES, dtype=torch.int64), r'floating-point dtype, got torch.int64'),
    ],
    ids=['few', 'many', 'scalar', 'few soft', 'many classes', 'too high', 'negative', 'float labels', 'integer soft'],
)
def test_targets_that_do_not_fit_are_rejected(target, message):
    task = create_task()
    with pytest.raises(ValueError, match=message):
        task(images(), target)


def test_a_rejected_target_draws_nothing():
    task = create_task()
    state = task.criterion.mixup.generator.get_state()
    with pytest.raises(ValueError, match='class indices'):
        task(images(), TARGET + NUM_CLASSES)
    assert torch.equal(task.criterion.mixup.generator.get_state(), state)


def test_the_criterion_in_the_plain_classification_task_names_the_right_task():
    model = create_model()
    task = ClassificationTask(model, CoreTuningLoss(model.num_features), verbose=False)
    with pytest.raises(ValueError, match='use timm_coretune.CoreTuningTask'):
        task(images(), TARGET)


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


class BlockingCopies(TorchDispatchMode):
    """Records copies between CPU and accelerator that make one wait for the other."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.num_asynchronous = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = None
        if func is torch.ops.aten._to_copy.default:
            copies = args[0].device, torch.device(kwargs.get('device') or args[0].device)
        elif func is torch.ops.aten.copy_.default:
            copies = args[1].device, args[0].device
        if copies is not None and copies[0].type != copies[1].type:
            non_blocking = kwargs.get('non_blocking', args[2] if len(args) > 2 else False)
            if non_blocking and copies[0].type == 'cpu':
                self.num_asynchronous += 1
            else:
                self.found.append(f'{func}: {copies[0].type} to {copies[1].type}, non_blocking={non_blocking}')
        return func(*args, **kwargs)


def blocking_copies(criterion):
    """Copies of a forward pass on an accelerator that need not exist, as its tensors hold no data."""
    try:
        with FakeTensorMode(), torch.device('cuda'):
            torch.nn.Linear(2, 2)(torch.randn(2, 2))
    except (RuntimeError, AssertionError) as e:
        pytest.skip(f'no CUDA tensors without data in this torch: {str(e).splitlines()[0]}')
    with FakeTensorMode(), torch.device('cuda'):
        module = training_module(criterion, 'test_resnet')
        input, target = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(NUM_CLASSES, (4,))
        with BlockingCopies() as copies:
            batch, draws = module.criterion.prepare(4, target.device)
            output = module(input, target, batch, draws)
        assert output['loss'].device.type == 'cuda'
        return copies


def test_only_the_draws_travel_to_the_accelerator_and_none_waits_for_them():
    copies = blocking_copies(CoreTuningLoss)
    assert copies.found == []
    assert copies.num_asynchronous == 3


@pytest.mark.parametrize('criterion, direction', [(DownloadLoss, 'cuda to cpu'), (UploadLoss, 'cpu to cuda')])
def test_a_copy_that_waits_would_be_noticed(criterion, direction):
    assert direction in ' '.join(blocking_copies(criterion).found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
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


def test_a_global_batch_of_one_process_is_its_own():
    assert GlobalBatch.create(3) == GlobalBatch(0, [3])
