"""Classifiers that are not affine: they are found, and classify mixed features"""

import copy
import random

import pytest
import timm
import torch
import torch.nn as nn
from losses import WIDTH, assert_losses_agree, make_criterion
from reference import array, cross_entropy, mine, mixtures, random_features, random_label, soft_target
from small_classifier import SmallClassifier
from timm.layers import ClassifierHead
from timm.models.levit import NormLinear
from timm.models.metaformer import MlpHead
from torch.nn.utils import parametrizations

from timm_coretune import CoreTuningTask
from timm_coretune.segmentation import SegmentationTask, create_segmentation_model
from timm_coretune.timm_model import probe_affine


def zeroed(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


LAYERS = {
    'linear': (lambda: nn.Linear(WIDTH, 3), True),
    'convolution': (lambda: nn.Conv2d(WIDTH, 3, 1), True),
    'identity': (nn.Identity, True),
    'dropout and linear': (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, 3)), True),
    'two linear': (lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.Linear(9, 3)), True),
    'batch norm and linear': (lambda: NormLinear(WIDTH, 3), True),
    'batch norm and convolution': (lambda: nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 3, 1)), True),
    'normalised weight': (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, 3)), True),
    'pooling and linear': (lambda: ClassifierHead(WIDTH, 3), True),
    'half precision': (lambda: nn.Sequential(nn.Linear(WIDTH, 3)).bfloat16(), True),
    'without data': (lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)).to('meta'), True),
    'mlp of timm': (lambda: MlpHead(WIDTH, 3), False),
    'mlp that starts at zero': (lambda: zeroed(nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, 3))), False),
    'mlp without data': (lambda: MlpHead(WIDTH, 3).to('meta'), False),
    'mlp in half precision': (lambda: MlpHead(WIDTH, 3).half(), False),
    'mlp of convolutions': (lambda: nn.Sequential(nn.Conv2d(WIDTH, 9, 1), nn.GELU(), nn.Conv2d(9, 3, 1)), False),
    'layer norm and linear': (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)), False),
    'prelu': (lambda: nn.Sequential(nn.PReLU(init=1.0), nn.Linear(WIDTH, 3)), False),
    'other width': (lambda: nn.Sequential(nn.Linear(WIDTH + 1, 3)), None),
}


@pytest.mark.parametrize('name', LAYERS)
def test_a_probe_tells_whether_a_layer_is_affine_and_leaves_no_trace(name):
    create, is_affine = LAYERS[name]
    layer = create()
    before, modes = copy.deepcopy(layer.state_dict()), [m.training for m in layer.modules()]
    state, python = torch.get_rng_state(), random.getstate()
    assert probe_affine(layer, WIDTH).is_affine is is_affine
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert [m.training for m in layer.modules()] == modes
    assert all(p.grad is None for p in layer.parameters())
    for key, value in layer.state_dict().items():
        assert value.is_meta or torch.equal(value, before[key]), key


class MlpClassifier(SmallClassifier):
    """With a head of two layers."""

    def __init__(self, head):
        super().__init__(nn.Linear(5, WIDTH), head, num_classes=4)


def expected_cross_entropy(features, target, classifier, criterion):
    """With all 3B rows built and classified, one by one."""
    draws = copy.deepcopy(criterion.mixup).draw(len(features))
    random_negative = criterion.mixup.pair(features, target, draws).negative.index.tolist()
    drawn = random_negative, draws.positive_lam.double().tolist(), draws.negative_lam.double().tolist()
    mined, rows, targets = mine(features, target), list(array(features)), soft_target(target, 4)
    for x, mixed in ((rows, mixtures(rows, mined, *drawn)), (targets, mixtures(targets, mined, *drawn))):
        x += [*mixed.positive, *(mixed.negative or [])]
    with torch.no_grad():
        logits = [array(classifier(torch.from_numpy(row)[None]))[0] for row in rows]
    return cross_entropy(logits, targets)


@pytest.mark.parametrize('label', [[0, 1, 0, 2, 1, 3], [2] * 6], ids=['classes', 'one class'])
@pytest.mark.parametrize('head', ['mlp', 'linear'])
def test_the_cross_entropy_is_that_of_mixed_features(head, label):
    torch.manual_seed(0)
    model = MlpClassifier(MlpHead(WIDTH, 4) if head == 'mlp' else nn.Linear(WIDTH, 4)).double()
    task = CoreTuningTask(model, make_criterion(contrast_weight=1.0), dtype=torch.float64, verbose=False)
    assert task.criterion.requires == (('classifier',) if head == 'mlp' else ())
    input, target = torch.randn(6, 5, dtype=torch.float64), torch.tensor(label)
    features = model.forward_features(input).detach()
    expected = expected_cross_entropy(features, target, model.head, task.criterion)
    by_hand = copy.deepcopy(task.criterion).losses(features, model.head(features), target, classifier=model.head)
    losses = task.train()(input, target)
    assert losses['task_loss'].item() == pytest.approx(expected, rel=1e-12)
    losses.pop('output')
    assert_losses_agree(losses, {name: loss.item() for name, loss in by_hand.items()})


def test_the_gradient_through_classified_mixtures_is_the_numerical_one():
    criterion, classifier = make_criterion(contrast_weight=1.0, temperature=0.5), MlpHead(WIDTH, 4).double()
    features, target = (random_features(6, 6, WIDTH) / 4).requires_grad_(), torch.tensor([0, 0, 1, 2, 1, 3])
    prepared = criterion.prepare(6, features.device)

    def loss(features, *_):  # gradcheck moves the parameters in place
        return criterion.compute(features, classifier(features), target, *prepared, classifier=classifier)['loss']

    assert torch.autograd.gradcheck(loss, (features, *classifier.parameters(), *criterion.projector.parameters()))


@pytest.mark.parametrize('name', ['caformer_s18', 'convformer_s18'])
def test_caformer_and_convformer_train_on_classified_mixtures(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).double()
    state = torch.get_rng_state()
    task = CoreTuningTask(model, contrast_weight=0.0, verbose=False).train()
    assert torch.equal(torch.get_rng_state(), state)
    input, target = torch.randn(6, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 3])
    calls = []
    model.head.fc.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    result = task(input, target)
    assert calls == [6, 12]
    with torch.no_grad():
        features = model.forward_head(model.forward_features(input), pre_logits=True)
    unused = CoreTuningTask(model, contrast_weight=0.0, verbose=False).criterion
    unused.generator.manual_seed(torch.initial_seed())
    expected = expected_cross_entropy(features, target, model.head.fc, unused)
    assert result['loss'].item() == pytest.approx(expected, rel=1e-10)
    result['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_compiled_step_with_classified_mixtures_is_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    task = CoreTuningTask(MlpClassifier(MlpHead(WIDTH, 4)), make_criterion(double=False), verbose=False).train()
    compiled = copy.deepcopy(task)
    compiled.compile(backend='aot_eager', fullgraph=True)
    input, target = torch.randn(6, 5), torch.tensor([0, 1, 0, 2, 1, 3])
    torch.testing.assert_close(compiled(input, target)['loss'], task(input, target)['loss'])


def test_a_copy_of_the_module_classifies_with_its_own_classifier():
    task = CoreTuningTask(MlpClassifier(MlpHead(WIDTH, 4)), make_criterion(double=False), verbose=False).train()
    duplicate, classifier = copy.deepcopy(task), task.trainable_module.model.head
    duplicate(torch.randn(6, 5), torch.tensor([0, 1, 0, 2, 1, 3]))['loss'].backward()
    assert all(p.grad is None for p in classifier.parameters())
    assert all(p.grad is not None for p in duplicate.trainable_module.model.head.parameters())


def test_a_loop_that_forgets_the_classifier_is_told():
    model, criterion = MlpClassifier(MlpHead(WIDTH, 4)), make_criterion(double=False)
    criterion.attach(model)
    features, target = torch.randn(6, WIDTH), random_label(0, 6, 4)
    with pytest.raises(ValueError, match=r'not affine.*Pass classifier=model\.get_classifier\(\)'):
        criterion(features, model.head(features), target)
    assert criterion(features, model.head(features), target, classifier=model.head).isfinite()


def test_a_classifier_that_mixed_features_do_not_fit_is_refused():
    head = nn.Sequential(nn.Conv2d(WIDTH, 9, 1), nn.GELU(), nn.Conv2d(9, 4, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r'features \(N, 6\), got 1 classifier.*MlpClassifier, of which Sequential is'):
        CoreTuningTask(MlpClassifier(head), make_criterion(), verbose=False)


def test_a_classifier_that_cannot_be_probed_is_said_to_be_assumed_affine(messages):
    CoreTuningTask(MlpClassifier(nn.Sequential(nn.Linear(WIDTH + 1, 4))), make_criterion(), verbose=False)
    (warning,) = messages('WARNING')
    assert 'Sequential of MlpClassifier does not take features of width 6' in warning


def test_the_decoder_of_a_segmentation_model_is_not_its_classifier(messages):
    model = create_segmentation_model('test_resnet', 3, 'fcn', img_size=(32, 32))
    assert SegmentationTask(model, verbose=False).criterion.requires == ()
    assert messages('WARNING') == []
