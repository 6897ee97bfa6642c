"""What a CoreTuningTask keeps: plain timm weights in checkpoints and averages, exact resume, parameter groups"""

import copy

import pytest
import torch
import torch.distributed as dist
from tasks import FAMILIES, TARGET, assert_same_state, create_model, create_task, gradients, images, step
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

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
    assert of_module.keys() | {'criterion._extra_state'} == before.keys()  # the latter is the random generator
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
    assert torch.equal(resumed.criterion.mixup.generator.get_state(), task.criterion.mixup.generator.get_state())
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
