"""Losses that keep a copy of the model: against loops, with the features that timm gives"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from methods import Step, bi_tuning, dr_tune, ldifs
from reference import array, generator

from timm_coretune import CoreTuningTask
from timm_coretune.distributed import GlobalBatch
from timm_coretune.loss import BiTuningLoss, DRTuneLoss, LDIFSLoss
from timm_coretune.loss.parts.bank import Bank
from timm_coretune.loss.parts.forward import forward_maps
from timm_coretune.timm_model import get_feature_dim

NUM_CLASSES = 4
LABELS = [[0, 1, 2, 0, 1], [2, 2, 2, 2, 2], [0, 1, 0, 1, 0], [1, 0, 0, 2, 0]]  # no image of class 3


class Loop:
    """A loop of one's own around a small model in float64."""

    def __init__(self, loss, name='test_vit', **kwargs):
        torch.manual_seed(0)
        size = {'img_size': 32} if 'vit' in name else {}
        self.model = timm.create_model(name, num_classes=NUM_CLASSES, **size).double()
        with torch.no_grad():
            self.model.get_classifier().weight.mul_(20)
            self.model.get_classifier().bias.normal_()
        self.pretrained = copy.deepcopy(self.model).eval()
        self.criterion = loss(get_feature_dim(self.model), **kwargs)
        self.criterion.attach(self.model)
        self.criterion.double()
        parameters = [p for p in [*self.model.parameters(), *self.criterion.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=0.02)

    def features_of(self, model, images):
        with torch.no_grad():
            return model.forward_head(model.forward_features(images), pre_logits=True)

    def steps(self, labels=LABELS):
        """What the reference knows of each step, and its losses. The update follows once they were seen."""
        for number, label in enumerate(labels):
            images = torch.randn(len(label), 3, 32, 32, dtype=torch.float64, generator=generator(number))
            target = torch.tensor(label)
            feature_map, maps = forward_maps(self.model, images, self.criterion.map_indices or [0])
            features = self.model.forward_head(feature_map, pre_logits=True)
            classifier = self.model.get_classifier()
            further = {'input': images, 'classifier': classifier, 'maps': maps}
            further = {name: further[name] for name in self.criterion.requires}
            logits = classifier(features)
            losses = self.criterion.losses(features, logits, target, **further)
            weights = dict(self.pretrained.named_parameters())
            yield (
                Step(self.criterion, self.model, weights, number, len(labels), images, features, logits, target),
                losses,
            )
            self.optimizer.zero_grad()
            losses['loss'].backward()
            self.optimizer.step()
            self.criterion.after_update(self.model)


def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize('kwargs', [{}, {'weight': 0.3, 'label_smoothing': 0.1}])
def test_the_bank_of_dr_tune_holds_the_last_images(kwargs):
    loop = Loop(DRTuneLoss, bank_size=12, **kwargs)
    seen = []
    for step, losses in loop.steps():
        before = loop.features_of(loop.pretrained, step.input)
        seen += zip(array(before), array(step.features), step.target.tolist(), strict=True)
        assert numbers(losses) == pytest.approx(dr_tune.losses(step, seen[-12:]), rel=1e-9)
    assert len(seen) > 12


def test_the_bank_of_dr_tune_trains_the_classifier_alone():
    loop = Loop(DRTuneLoss)
    steps = loop.steps()
    next(steps)
    step, losses = next(steps)
    inputs = step.features, loop.model.get_classifier().weight
    of_features, of_weight = torch.autograd.grad(losses['bank_loss'], inputs, allow_unused=True)
    assert of_features is None
    assert of_weight.abs().max() > 0


@pytest.mark.parametrize(
    ('name', 'modules'),
    [
        ('test_resnet', ['act1', 'layer1', 'layer2', 'layer3', 'layer4']),
        # of 6 blocks, the ends of four quarters
        ('test_vit', ['blocks.0', 'blocks.2', 'blocks.3', 'blocks.5']),
    ],
)
def test_ldifs_compares_the_ends_of_stages(name, modules):
    loop = Loop(LDIFSLoss, name, weight=3.0, label_smoothing=0.1)
    for step, losses in loop.steps(LABELS[:2]):
        with_buffers = step._replace(pretrained=loop.pretrained.state_dict())
        assert numbers(losses) == pytest.approx(ldifs.losses(with_buffers, modules), rel=1e-9)
    assert losses['distance_loss'] > 1e-6


@pytest.mark.parametrize('kwargs', [{}, {'contrast_weight': 0.5, 'temperature': 0.2, 'label_smoothing': 0.1}])
def test_the_queue_of_bi_tuning_holds_the_last_keys_of_each_class_and_its_encoder_follows(kwargs):
    loop = Loop(BiTuningLoss, queue_size=4, momentum=0.9, projection_dim=6, **kwargs)
    encoder, projector = loop.pretrained, copy.deepcopy(loop.criterion.projector)
    seen = []
    for step, losses in loop.steps():
        seen += bi_tuning.keys_of(loop.features_of(encoder, step.input), projector, step.target.tolist())
        queue = [row for c in range(NUM_CLASSES) for row in [s for s in seen if s[2] == c][-4:]]
        assert numbers(losses) == pytest.approx(bi_tuning.losses(step, queue), rel=1e-9)
        # the update to come, and what follows it
        parameters = [*loop.model.parameters(), *loop.criterion.projector.parameters()]
        gradients = torch.autograd.grad(losses['loss'], parameters, retain_graph=True)
        followers = [*encoder.parameters(), *projector.parameters()]
        with torch.no_grad():
            for follower, p, gradient in zip(followers, parameters, gradients, strict=True):
                follower.copy_(0.9 * follower + 0.1 * (p - 0.02 * gradient))


def test_the_prototypes_of_bi_tuning_train_the_features_alone():
    loop = Loop(BiTuningLoss)
    step, losses = next(loop.steps())
    inputs = step.features, loop.model.get_classifier().weight
    found = torch.autograd.grad(losses['prototype_loss'], inputs, allow_unused=True)
    assert found[0].abs().max() > 0
    assert found[1] is None


@pytest.mark.parametrize('num_classes', [None, 2])
def test_a_bank_keeps_the_newest_rows_and_never_those_without_a_class(num_classes):
    bank = Bank(3, {'row': 1}, num_classes)
    kept = {}
    number = 0
    for labels in ([0, 1, -1, 0], [0, 0, 0, 0, 1], [-1], [1, 1], []):
        rows = torch.arange(number, number + len(labels)) + 1.0
        number += len(labels)
        bank.add(GlobalBatch.create(len(labels)), torch.tensor(labels, dtype=torch.int64), row=rows[:, None])
        for label, row in zip(labels, rows.tolist(), strict=True):
            if label >= 0:
                group = label if num_classes else 'all'
                kept[group] = [*kept.get(group, []), (label, row)][-3:]
        found = zip(bank.label.tolist(), bank.row.flatten().tolist(), strict=True)
        assert sorted(row for row in found if row[0] >= 0) == sorted(row for rows in kept.values() for row in rows)
        assert bank.label[-1] == -1
        assert bank.row[-1] == 0


def test_the_key_encoder_copies_running_statistics():
    loop = Loop(BiTuningLoss, 'test_resnet')
    list(loop.steps(LABELS[:1]))
    assert torch.equal(loop.criterion.encoder.model.bn1.running_mean, loop.model.bn1.running_mean)
    assert not torch.equal(loop.pretrained.bn1.running_mean, loop.model.bn1.running_mean)
    assert F.mse_loss(loop.criterion.encoder.model.conv1[0].weight, loop.model.conv1[0].weight) > 0


# models and input that fit, and those that do not


class Patches(dict):
    """A dictionary of patches, as timm's loader of images of several sizes makes them."""

    def __init__(self):
        rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing='ij')
        coordinates = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
        super().__init__(
            patches=torch.randn(4, 6, 16 * 16 * 3, generator=generator(0)),
            patch_coord=coordinates.expand(4, -1, -1),
            patch_valid=torch.arange(6) < torch.tensor([[6], [6], [4], [3]]),
        )


@pytest.mark.parametrize('loss', [DRTuneLoss, BiTuningLoss, LDIFSLoss])
def test_dictionaries_of_patches_give_the_features_of_the_copy_or_a_clear_error(loss):
    model = timm.create_model(
        'naflexvit_base_patch16_gap', num_classes=NUM_CLASSES, depth=1, embed_dim=24, num_heads=2
    )  # fmt: skip
    task = CoreTuningTask(model, loss(24), verbose=False)
    task.get_trainable_module().train()
    target = torch.tensor([0, 1, 0, 2])
    if loss is LDIFSLoss:
        with pytest.raises(ValueError, match='Expected images .*LDIFSLoss compares feature maps, got a dictionary'):
            task(Patches(), target)
        return
    task(Patches(), target)['loss'].backward()
    inputs = []
    model.get_classifier().register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model.eval()(Patches())
    rows = task.criterion.bank.pretrained if loss is DRTuneLoss else task.criterion.queue.feature[:, :-1]
    label = task.criterion.bank.label if loss is DRTuneLoss else task.criterion.queue.label
    for features, y in zip(inputs[0], target, strict=True):
        similarity = torch.cosine_similarity(rows[label == y], features[None])
        assert similarity.max() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize('loss', [DRTuneLoss, BiTuningLoss])
def test_a_classifier_that_is_a_convolution_is_one_that_is_linear(loss):
    task = CoreTuningTask(timm.create_model('resnetv2_18', num_classes=3), loss(512), verbose=False)
    classifier = task.get_eval_model().get_classifier()
    assert isinstance(classifier, torch.nn.Conv2d)
    task.get_trainable_module().train()
    task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 2]))['loss'].backward()
    assert classifier.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ('loss', 'model', 'message'),
    [
        (
            DRTuneLoss,
            'crossvit_tiny_240',
            r'one classifier that takes features \(N, 288\), got CrossVit with Linear, Lin',
        ),
        (BiTuningLoss, 'crossvit_tiny_240', 'one linear classifier, got CrossVit with Linear, Linear'),
        (BiTuningLoss, 'repvit_m1', 'one linear classifier, got RepVit with RepVitClassifier'),
    ],
)
def test_models_that_do_not_fit_are_refused(loss, model, message):
    model = timm.create_model(model, num_classes=3)
    with pytest.raises(ValueError, match=message):
        CoreTuningTask(model, loss(get_feature_dim(model)))


def test_a_model_without_feature_maps_is_refused():
    model = timm.create_model('test_vit', num_classes=3)
    model.feature_info = []
    with pytest.raises(ValueError, match='feature_info and forward_intermediates.*VisionTransformer without.*l2-sp'):
        CoreTuningTask(model, 'ldifs')


@pytest.mark.parametrize('loss', [DRTuneLoss, BiTuningLoss])
def test_what_is_remembered_must_be_that_of_all_processes(loss):
    with pytest.raises(ValueError, match='gather=True.*the same on all processes.*--no-coretune-gather'):
        loss(8, gather=False)


@pytest.mark.parametrize('loss', [DRTuneLoss, BiTuningLoss, LDIFSLoss])
def test_a_loop_of_ones_own_is_told_to_attach_the_model(loss):
    features, classifier = torch.randn(4, 8), torch.nn.Linear(8, 3)
    given = {'input': torch.randn(4, 3, 8, 8), 'classifier': classifier, 'maps': []}
    further = {name: given[name] for name in loss.requires}
    with pytest.raises(RuntimeError, match=r'criterion.attach\(model\) before the first step'):
        loss(8)(features, classifier(features), torch.tensor([0, 1, 2, 0]), **further)


@pytest.mark.parametrize(
    'wrong',
    [lambda: DRTuneLoss(8, weight=0.0), lambda: DRTuneLoss(8, bank_size=0), lambda: LDIFSLoss(8, weight=-1.0),
     lambda: BiTuningLoss(8, momentum=1.5), lambda: BiTuningLoss(8, temperature=0.0)],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match='Expected .*got'):
        wrong()


@pytest.mark.parametrize('loss', [DRTuneLoss, BiTuningLoss])
def test_processes_do_not_send_each_other_what_all_of_them_remember(loss):
    task = CoreTuningTask(timm.create_model('test_vit', num_classes=3), loss(64), verbose=False)
    module = task.get_trainable_module()
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    assert ignored <= {name for name, _ in module.named_buffers()}
    assert {'tuned' if loss is DRTuneLoss else 'feature', 'label'} <= {name.split('.')[-1] for name in ignored}
