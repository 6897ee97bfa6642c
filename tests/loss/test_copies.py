"""Losses that keep a copy of the model: against loops, with the features that timm gives"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from methods import bi_tuning, dr_tune, ldifs

from timm_coretune.loss import BiTuningLoss, DRTuneLoss, LDIFSLoss
from timm_coretune.loss.parts.bank import Bank
from timm_coretune.timm_model import forward_maps, get_feature_dim

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

    def pre_logits(self, model, images):
        return model.forward_head(model.forward_features(images), pre_logits=True)

    def steps(self, labels=LABELS):
        """Images, their classes, features, logits and losses of each step. The update follows once they were seen."""
        for number, label in enumerate(labels):
            images = torch.randn(len(label), 3, 32, 32, dtype=torch.float64, generator=seeded(number))
            target = torch.tensor(label)
            feature_map, maps = forward_maps(self.model, images, self.criterion.map_indices or [0])
            features = self.model.forward_head(feature_map, pre_logits=True)
            classifier = self.model.get_classifier()
            further = {'input': images, 'classifier': classifier, 'maps': maps}
            further = {name: further[name] for name in self.criterion.requires}
            logits = classifier(features)
            losses = self.criterion.losses(features, logits, target, **further)
            yield images, target, features, logits, losses
            self.optimizer.zero_grad()
            losses['loss'].backward()
            self.optimizer.step()
            self.criterion.after_update(self.model)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


def layer(classifier):
    return classifier.weight.tolist(), classifier.bias.tolist()


@pytest.mark.parametrize('kwargs', [{}, {'weight': 0.3, 'label_smoothing': 0.1}])
def test_dr_tune_is_its_formula(kwargs):
    loop = Loop(DRTuneLoss, bank_size=12, **kwargs)
    weight, smoothing = kwargs.get('weight'), kwargs.get('label_smoothing', 0.0)
    seen = []
    for images, target, features, logits, losses in loop.steps():
        with torch.no_grad():
            before = loop.pre_logits(loop.pretrained, images)
        seen += zip(before.tolist(), features.tolist(), target.tolist(), strict=True)
        classifier = layer(loop.model.get_classifier())
        expected = dr_tune.expected(logits.tolist(), target.tolist(), seen[-12:], *classifier, weight, smoothing)
        assert numbers(losses) == pytest.approx(expected, rel=1e-9)
    assert len(seen) > 12


def test_the_bank_of_dr_tune_trains_the_classifier_alone():
    loop = Loop(DRTuneLoss)
    steps = loop.steps()
    next(steps)
    _, _, features, _, losses = next(steps)
    assert torch.autograd.grad(losses['bank_loss'], features, retain_graph=True, allow_unused=True) == (None,)
    # each of the 10 rows counts as one of the 5 of the batch
    assert losses['loss'].item() == pytest.approx((losses['task_loss'] + 2 * losses['bank_loss']).item())
    assert torch.autograd.grad(losses['bank_loss'], loop.model.get_classifier().weight)[0].abs().max() > 0


@pytest.mark.parametrize(
    ('name', 'modules'),
    [
        ('test_resnet', ['act1', 'layer1', 'layer2', 'layer3', 'layer4']),
        # of 6 blocks, the ends of four quarters
        ('test_vit', ['blocks.0', 'blocks.2', 'blocks.3', 'blocks.5']),
    ],
)
def test_ldifs_is_its_formula(name, modules):
    loop = Loop(LDIFSLoss, name, weight=3.0, label_smoothing=0.1)

    def layers_of(model, images):
        maps = []
        hooks = [model.get_submodule(m).register_forward_hook(lambda _, args, out: maps.append(out)) for m in modules]
        with torch.no_grad():
            features = loop.pre_logits(model, images)
        for hook in hooks:
            hook.remove()
        pooled = [m.mean((2, 3)) if m.ndim == 4 else m[:, 1:].mean(1) for m in maps]
        return [m.tolist() for m in [*pooled, features]]

    for images, target, _, logits, losses in loop.steps(LABELS[:2]):
        pairs = zip(layers_of(loop.model, images), layers_of(loop.pretrained, images), strict=True)
        expected = ldifs.expected(logits.tolist(), target.tolist(), list(pairs), 3.0, 0.1)
        assert numbers(losses) == pytest.approx(expected, rel=1e-9)
    assert losses['distance_loss'] > 1e-6


@pytest.mark.parametrize('kwargs', [{}, {'contrast_weight': 0.5, 'temperature': 0.2, 'label_smoothing': 0.1}])
def test_bi_tuning_is_its_formula(kwargs):
    loop = Loop(BiTuningLoss, queue_size=4, momentum=0.9, projection_dim=6, **kwargs)
    criterion, encoder = loop.criterion, loop.pretrained
    projector = copy.deepcopy(criterion.projector)
    seen = []
    for images, target, features, logits, losses in loop.steps():
        with torch.no_grad():
            key = loop.pre_logits(encoder, images)
            seen += zip(key.tolist(), projector(key).tolist(), target.tolist(), strict=True)
            projections = criterion.projector(features).tolist()
        queue = [row for c in range(NUM_CLASSES) for row in [s for s in seen if s[2] == c][-4:]]
        expected = bi_tuning.expected(
            *(features.tolist(), logits.tolist(), target.tolist(), projections, queue),
            *layer(loop.model.get_classifier()),
            kwargs.get('contrast_weight', 1.0),
            kwargs.get('temperature', 0.07),
            kwargs.get('label_smoothing', 0.0),
        )
        assert numbers(losses) == pytest.approx(expected, rel=1e-9)
        # the update to come, and what follows it
        parameters = [*loop.model.parameters(), *criterion.projector.parameters()]
        gradients = torch.autograd.grad(losses['loss'], parameters, retain_graph=True)
        followers = [*encoder.parameters(), *projector.parameters()]
        with torch.no_grad():
            for follower, p, gradient in zip(followers, parameters, gradients, strict=True):
                follower.copy_(0.9 * follower + 0.1 * (p - 0.02 * gradient))


def test_the_prototypes_of_bi_tuning_train_the_features_alone():
    loop = Loop(BiTuningLoss)
    (_, _, features, _, losses) = next(loop.steps())
    classifier = loop.model.get_classifier()
    found = torch.autograd.grad(losses['prototype_loss'], [features, classifier.weight], allow_unused=True)
    assert found[0].abs().max() > 0
    assert found[1] is None


def test_a_bank_keeps_the_newest_rows_of_each_group_and_never_those_without_a_class():
    bank = Bank(3, {'row': 1}, num_groups=2)
    kept = {0: [], 1: []}
    number = 0
    for groups in ([0, 1, -1, 0], [0, 0, 0, 0, 1], [-1], [1, 1], []):
        group = torch.tensor(groups, dtype=torch.int64)
        rows = torch.arange(number, number + len(groups)) + 1.0
        number += len(groups)
        bank.add(group, group, row=rows[:, None])
        for g, row in zip(groups, rows.tolist(), strict=True):
            if g >= 0:
                kept[g] = [*kept[g], row][-3:]
        for g, expected in kept.items():
            assert sorted(bank.row[bank.label == g].flatten().tolist()) == sorted(expected)
        assert bank.label[-1] == -1
        assert bank.row[-1] == 0


def test_the_key_encoder_copies_running_statistics():
    loop = Loop(BiTuningLoss, 'test_resnet')
    list(loop.steps(LABELS[:1]))
    assert torch.equal(loop.criterion.encoder.model.bn1.running_mean, loop.model.bn1.running_mean)
    assert not torch.equal(loop.pretrained.bn1.running_mean, loop.model.bn1.running_mean)
    assert F.mse_loss(loop.criterion.encoder.model.conv1[0].weight, loop.model.conv1[0].weight) > 0
