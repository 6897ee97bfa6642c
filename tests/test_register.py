"""Core-tuning is found where a timm user looks for it, and nothing else in timm changes."""

import functools
import inspect

import pytest
import timm
import timm.data
import timm.loss
import timm.task
import torch
from timm.loss import _loss_factory as factory

import timm_coretune
from timm_coretune import CoreTuningLoss, CoreTuningTask
from timm_coretune.loss import LOSSES
from timm_coretune.register import create_task_loss, register

create_coretune_loss = functools.partial(create_task_loss, 'coretune')

OTHER_LOSSES = {
    'default': dict(),
    'default multi-label': dict(multi_label=True),
    'ce': dict(loss_type='ce'),
    'ce smoothing': dict(loss_type='ce', smoothing=0.1),
    'ce soft targets': dict(loss_type='ce', smoothing=0.1, soft_targets=True),
    'bce': dict(loss_type='bce', smoothing=0.1, bce_target_thresh=0.2, bce_sum=True, pos_weight=2.0),
    'bce multi-label': dict(loss_type='bce', multi_label=True, class_weight=[1.0, 2.0, 3.0]),
    'asl': dict(loss_type='asl', asl_gamma_neg=3.0),
    'asl multi-label': dict(loss_type='asl', multi_label=True, asl_clip=None),
    'poly': dict(loss_type='poly', poly_epsilon=1.0),
    'poly multi-label': dict(loss_type='poly', multi_label=True, poly_gamma=1.0),
    'jsd': dict(loss_type='jsd', jsd_splits=3),
    'twoway': dict(loss_type='twoway', multi_label=True, twoway_tp=2.0),
    'zlpr': dict(loss_type='zlpr', multi_label=True),
    'db': dict(loss_type='db', multi_label=True, class_counts=[3, 4, 5], num_samples=9),
}
WRONG = {
    'unknown type': dict(loss_type='coretuning'),
    'empty jsd': dict(loss_type='jsd'),
    'single-label twoway': dict(loss_type='twoway'),
    'multi-label ce': dict(loss_type='ce', multi_label=True),
    'db without counts': dict(loss_type='db', multi_label=True),
    'unknown argument': dict(loss_type='ce', num_features=8),
}


def describe(loss):
    """Class, numbers and tensors of a criterion."""
    plain = {k: v for k, v in vars(loss).items() if isinstance(v, (int, float, str, bool, type(None)))}
    tensors = {k: v.tolist() for k, v in loss.state_dict().items()}
    buffers = {k: v.tolist() for k, v in loss.named_buffers()}
    return type(loss), plain, tensors, buffers


def places():
    return [factory, timm.loss, timm.task, timm.task.classification]


def test_timm_exposes_the_names():
    assert timm.loss.CoreTuningLoss is timm_coretune.CoreTuningLoss
    assert timm.loss.FocalSupConLoss is timm_coretune.FocalSupConLoss
    assert timm.data.HardPairMixup is timm_coretune.HardPairMixup
    assert timm.task.CoreTuningTask is timm_coretune.CoreTuningTask


def test_the_factory_creates_the_loss_with_the_arguments_of_timm_and_its_own():
    loss = timm.loss.create_classification_loss(
        'coretune', num_features=12, smoothing=0.2, contrast_weight=0.5, temperature=0.1, projection_dim=7
    )
    assert type(loss) is CoreTuningLoss
    assert (loss.num_features, loss.label_smoothing, loss.contrast_weight) == (12, 0.2, 0.5)
    assert loss.contrast.temperature == 0.1
    assert loss.projector.fc2.out_features == 7


@pytest.mark.parametrize('create', [lambda **kw: timm.loss.create_classification_loss(**kw), create_coretune_loss])
def test_smoothing_is_left_to_pixel_mixup_when_targets_are_soft(create):
    kwargs = dict(num_features=12, smoothing=0.2)
    if create is not create_coretune_loss:
        kwargs['loss_type'] = 'coretune'
    assert create(**kwargs).label_smoothing == 0.2
    assert create(soft_targets=True, **kwargs).label_smoothing == 0.0


def test_types_and_factory_are_the_same_wherever_timm_keeps_them():
    types = [module.LOSS_TYPES for module in places() if hasattr(module, 'LOSS_TYPES')]
    creates = [module.create_classification_loss for module in places()]
    assert len(types) == 3
    assert all(each == types[0] for each in types)
    assert types[0][-len(LOSSES) :] == tuple(LOSSES)
    assert types[0].count('coretune') == 1
    assert len(creates) == 4
    assert all(create is creates[0] for create in creates)
    assert 'coretune' not in timm.loss.MULTI_LABEL_LOSS_TYPES


def test_the_cases_here_cover_every_other_type():
    assert {case.get('loss_type', 'ce') for case in OTHER_LOSSES.values()} == set(timm.loss.LOSS_TYPES) - set(LOSSES)


@pytest.mark.parametrize('kwargs', OTHER_LOSSES.values(), ids=OTHER_LOSSES)
def test_every_other_loss_is_what_it_was(kwargs):
    create = timm.loss.create_classification_loss
    assert create is not create.__wrapped__
    assert describe(create(**kwargs)) == describe(create.__wrapped__(**kwargs))


def test_the_type_may_be_passed_by_position():
    create = timm.loss.create_classification_loss
    assert describe(create('ce', False, 0.1)) == describe(create.__wrapped__('ce', False, 0.1))
    assert type(create('coretune', 9)) is CoreTuningLoss


@pytest.mark.parametrize('kwargs', WRONG.values(), ids=WRONG)
def test_what_timm_refused_it_still_refuses(kwargs):
    create = timm.loss.create_classification_loss
    with pytest.raises((ValueError, TypeError)) as before:
        create.__wrapped__(**kwargs)
    with pytest.raises(type(before.value)) as after:
        create(**kwargs)
    assert type(after.value) is type(before.value)
    assert str(after.value) == str(before.value)


def test_an_unknown_type_is_answered_with_a_list_that_has_coretune():
    with pytest.raises(ValueError, match="Unknown loss type 'coretuning', expected one of .*'coretune'"):
        timm.loss.create_classification_loss('coretuning')


def test_registering_again_changes_nothing():
    names = ('create_classification_loss', 'LOSS_TYPES', 'CoreTuningLoss', 'FocalSupConLoss', 'HardPairMixup')
    modules = [*places(), timm.data]
    before = [(module, name, getattr(module, name, None)) for module in modules for name in names]
    register()
    timm_coretune.register()
    for module, name, value in before:
        assert getattr(module, name, None) is value, (module.__name__, name)


def defaults_of_timm():
    parameters = inspect.signature(timm.loss.create_classification_loss.__wrapped__).parameters
    return {name: p.default for name, p in parameters.items() if name != 'loss_type'}


def test_the_defaults_of_the_factory_are_taken():
    every = timm.loss.create_classification_loss('coretune', num_features=8, **defaults_of_timm())
    plain = timm.loss.create_classification_loss('coretune', num_features=8)
    assert every.extra_repr() == plain.extra_repr()


OF_EVERY_LOSS = {'multi_label', 'smoothing', 'soft_targets', 'class_weight'}


@pytest.mark.parametrize('name', sorted(defaults_of_timm().keys() - OF_EVERY_LOSS))
def test_what_the_loss_cannot_do_is_refused_by_name(name):
    value = {bool: True, str: 'sum'}.get(type(defaults_of_timm()[name]), 3.5)
    with pytest.raises(ValueError, match=f'{name}={value!r} belong.* to other losses of timm'):
        timm.loss.create_classification_loss('coretune', num_features=8, **{name: value})


def test_weights_of_positives_are_refused_as_tensors_too():
    with pytest.raises(ValueError, match='pos_weight=tensor'):
        timm.loss.create_classification_loss('coretune', num_features=8, pos_weight=torch.ones(3))


def test_weights_of_classes_and_several_labels_are_those_of_the_loss():
    loss = timm.loss.create_classification_loss('coretune', num_features=8, class_weight=torch.tensor([1.0, 2.0]))
    assert loss.class_weight.tolist() == [1, 2]
    loss = timm.loss.create_classification_loss('scl', num_features=8, multi_label=True, smoothing=0.1)
    assert (loss.multi_label, loss.classification_loss.smoothing) == (True, 0.1)
    with pytest.raises(ValueError, match='BCLLoss compares images by their one class, got multi_label=True'):
        timm.loss.create_classification_loss('bcl', num_features=8, multi_label=True)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(), "'coretune' requires num_features, .*model.head_hidden_size or model.num_features"),
        (dict(num_features=8, bce_sum=True), "'coretune' takes the arguments of CoreTuningLoss: .*bce_sum"),
        (dict(num_features=8, contrast_weight=-1.0), 'contrast_weight >= 0, got -1.0'),
    ],
    ids=['no width', 'argument of another loss', 'out of range'],
)
def test_wrong_arguments_are_answered_with_the_remedy(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_coretune_loss(**kwargs)
    with pytest.raises(ValueError, match=message):
        timm.loss.create_classification_loss('coretune', **kwargs)


def test_the_plain_classification_task_with_this_loss_names_the_right_task():
    model = timm.create_model('test_resnet', num_classes=3)
    task = timm.task.ClassificationTask(
        model, criterion_kwargs=dict(loss_type='coretune', num_features=model.num_features), verbose=False
    )
    with pytest.raises(ValueError, match='use timm_coretune.CoreTuningTask'):
        task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))


def test_a_loss_of_the_factory_trains_in_the_right_task():
    model = timm.create_model('test_resnet', num_classes=3)
    loss = timm.loss.create_classification_loss('coretune', num_features=model.num_features)
    task = CoreTuningTask(model, criterion=loss, verbose=False)
    assert task(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))['loss'].requires_grad


@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv3_small_050'])  # whose widths before the head differ
def test_the_model_tells_the_width_of_its_features(name):
    model = timm.create_model(name, num_classes=3)
    width = model.get_classifier().in_features
    for loss_type in LOSSES:
        loss = timm.loss.create_classification_loss(loss_type, num_features=model)
        assert loss.num_features in (width, None), loss_type  # None for losses that accept any
    criterion = CoreTuningLoss(model)
    assert (criterion.num_features, criterion.projector.fc1.in_features) == (width, width)
    assert not any(part is model for part in criterion.modules())
    with pytest.raises(ValueError, match='Linear has neither head_hidden_size nor num_features'):
        CoreTuningLoss(torch.nn.Linear(2, 2))
