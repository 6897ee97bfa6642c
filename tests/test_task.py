"""CoreTuningTask is a timm TrainingTask like any other.

Protected here: one pass through an unchanged backbone, the losses of CoreTuningLoss, plain timm weights for evaluation
and nothing kept of a step.
"""

import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
from accelerate.utils import send_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from tasks import (
    BATCH_SIZE,
    FAMILIES,
    NUM_CLASSES,
    TARGET,
    assert_same_state,
    count_calls,
    create_model,
    create_task,
    gradients,
    images,
)
from timm.data import Mixup
from timm.task import ClassificationTask
from torch.utils._pytree import tree_map_only

from timm_coretune import CoreTuningLoss
from timm_coretune.distributed import GlobalBatch

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


def hooks_of(model):
    kinds = ('_forward_pre_hooks', '_forward_hooks', '_backward_hooks', '_backward_pre_hooks')
    return {name: kind for name, part in model.named_modules() for kind in kinds if getattr(part, kind)}


@pytest.mark.parametrize('name', FAMILIES)
def test_nothing_of_a_task_stays_on_the_model(name):
    model = create_model(name)
    before = model.state_dict().keys()
    for _ in range(4):
        task = create_task(model)
        assert hooks_of(model) == {}
        task(images(), TARGET)['loss'].backward()
        assert hooks_of(model) == {}
    assert model.state_dict().keys() == before
    stored = pickle.dumps(model)
    assert b'timm_coretune' not in stored
    assert hooks_of(pickle.loads(stored)) == {}


def test_a_model_can_be_scripted_while_a_task_trains_it():
    model = create_model()
    task = create_task(model)
    task(images(), TARGET)
    scripted = torch.jit.script(model.eval())
    assert torch.equal(scripted(images()), model(images()))


def test_a_step_that_fails_leaves_nothing_on_the_model_either(monkeypatch):
    model = create_model()
    task = create_task(model)
    monkeypatch.setattr(model.global_pool, 'forward', lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task(images(), TARGET)
    assert hooks_of(model) == {}
    monkeypatch.undo()
    assert task(images(), TARGET)['loss'].isfinite()


def test_a_deep_copy_trains_on_its_own():
    task = create_task(create_model('mobilenetv3_small_050'))
    module = task.trainable_module
    duplicate = copy.deepcopy(module)
    arguments = (images(), TARGET, *module.criterion.prepare(BATCH_SIZE, TARGET.device))
    calls = count_calls(duplicate.model)
    torch.manual_seed(2)
    actual = duplicate(*arguments)
    actual['loss'].backward()
    assert calls['conv_head'] == 1
    assert all(grad is None for grad in gradients(module).values())
    torch.manual_seed(2)
    expected = module(*arguments)
    expected['loss'].backward()
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key
    assert_same_state(gradients(duplicate), gradients(module))


# errors


def test_a_model_without_classifier_is_rejected():
    with pytest.raises(ValueError, match=r'num_classes > 0, got ResNet with num_classes=0\. Create the model with'):
        create_task(create_model(num_classes=0))


def test_a_module_that_is_no_timm_classifier_is_rejected():
    with pytest.raises(ValueError, match='Expected a timm classifier .* got Linear with num_classes=None'):
        create_task(torch.nn.Linear(2, 2))


@pytest.mark.parametrize('name', ['forward_features', 'forward_head', 'get_classifier'])
def test_a_model_without_a_method_is_told_which(name):
    class Own(torch.nn.Module):
        num_classes = num_features = 4

    for method in {'forward_features', 'forward_head', 'get_classifier'} - {name}:
        setattr(Own, method, lambda self, *args: None)
    with pytest.raises(ValueError, match=rf'timm classifier, got Own without {name}\. Add the method'):
        create_task(Own())


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


@pytest.mark.parametrize('num_targets', [3, 7])
def test_targets_that_do_not_fit_a_dictionary_of_patches_are_rejected(num_targets):
    task = create_task(
        timm.create_model('naflexvit_base_patch16_gap', num_classes=NUM_CLASSES, depth=1, embed_dim=24, num_heads=2)
    )
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing='ij')
    patches = {
        'patches': torch.randn(4, 6, 16 * 16 * 3),
        'patch_coord': torch.stack([rows.flatten(), columns.flatten()], dim=-1).expand(4, -1, -1),
        'patch_valid': torch.ones(4, 6, dtype=torch.bool),
    }
    assert task(patches, torch.tensor([0, 1, 0, 2]))['loss'].isfinite()
    state = task.criterion.generator.get_state()
    with pytest.raises(ValueError, match=rf'class indices \(4,\).* got \({num_targets},\).*the same batch'):
        task(patches, torch.zeros(num_targets).long())
    assert torch.equal(task.criterion.generator.get_state(), state)


def test_the_criterion_in_the_plain_classification_task_names_the_right_task():
    model = create_model()
    task = ClassificationTask(model, CoreTuningLoss(model.num_features), verbose=False)
    with pytest.raises(ValueError, match='use timm_coretune.CoreTuningTask'):
        task(images(), TARGET)


# wrappers


@pytest.mark.parametrize('mixup_enabled', [True, False])
def test_wrappers_can_rebuild_the_arguments_of_a_step(mixup_enabled):
    task = create_task(create_model('test_vit'))
    task.criterion.mixup.mixup_enabled = mixup_enabled
    arguments = []
    task.trainable_module.register_forward_pre_hook(lambda module, args: arguments.extend(args[2:]))
    expected = task(images(), TARGET)['loss']
    prepared = tuple(arguments)
    by_lightning = apply_to_collection(prepared, torch.Tensor, torch.clone)
    by_torch = tree_map_only(torch.Tensor, torch.clone, prepared)
    by_accelerate = send_to_device(prepared, TARGET.device)
    rounded = apply_to_collection(prepared, torch.Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x)
    module = task.trainable_module
    for rebuilt in (by_lightning, by_torch, by_accelerate, rounded, copy.deepcopy(prepared)):
        assert rebuilt[0] == GlobalBatch(0, [BATCH_SIZE])
        assert torch.equal(module(images(), TARGET, *rebuilt)['loss'], expected)


def test_a_task_trains_under_fabric_in_mixed_precision():
    fabric = pytest.importorskip('lightning_fabric').Fabric(accelerator='cpu', devices=1, precision='bf16-mixed')
    task, alone = create_task(create_model('test_vit')), create_task(create_model('test_vit'))
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    task.trainable_module, optimizer = fabric.setup(task.trainable_module, optimizer)
    result = task(images(), TARGET)
    fabric.backward(result['loss'])
    optimizer.step()
    with torch.autocast('cpu', torch.bfloat16):
        expected = alone(images(), TARGET)['loss']
    torch.testing.assert_close(result['loss'], expected)


# synchronisation with the device


@pytest.mark.parametrize('multi_label', [False, True], ids=['one label', 'several labels'])
def test_the_evaluator_is_that_of_timm_for_such_targets(multi_label):
    task = create_task(create_model('test_resnet'), multi_label=multi_label)
    assert task.multi_label is multi_label
    output = torch.randn(BATCH_SIZE, NUM_CLASSES)
    if multi_label:
        target = (output.sigmoid() > 0.4).float()
        evaluator = task.create_evaluator(threshold=0.4)
        score = 'micro_f1'
    else:
        target, evaluator, score = output.argmax(dim=1), task.create_evaluator(), 'top1'
    evaluator.update(output, target)
    assert evaluator.compute()[score] == 100


def test_a_global_batch_of_one_process_is_its_own():
    assert GlobalBatch.create(3) == GlobalBatch(0, [3])
