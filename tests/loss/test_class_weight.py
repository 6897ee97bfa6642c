"""Class weights weigh clean images and mixtures alike, as torch's cross-entropy of soft targets does"""

import pytest
import torch
import torch.nn.functional as F

from timm_coretune import SegmentationTask, create_segmentation_model
from timm_coretune.distributed import GlobalBatch
from timm_coretune.loss import METHODS, CoreTuningLoss, create_method
from timm_coretune.loss.core_tuning import PARTS
from timm_coretune.segmentation.dense import DenseCrossEntropy

WEIGHT = torch.tensor([0.5, 3.0, 1.0, 0.0])


def batch(num_rows=12, num_features=6, num_classes=4):
    generator = torch.Generator().manual_seed(3)
    features, logits = (
        torch.randn(num_rows, width, dtype=torch.float64, generator=generator) for width in (num_features, num_classes)
    )
    return features, logits, torch.randint(num_classes, (num_rows,), generator=generator)


def weighted(logits, target, smoothing=0.0):
    """The mean over rows of torch's weighted cross-entropy of soft targets."""
    soft = F.one_hot(target, 4).double() if target.ndim == 1 else target
    soft = (1 - smoothing) * soft + smoothing / 4
    return F.cross_entropy(logits, soft, weight=WEIGHT.double(), reduction='none').mean()


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('smooth', ['both', 'negative', 'none'])
def test_mixtures_have_the_mixed_weight(smooth, smoothing):
    features, logits, target = batch()
    loss = CoreTuningLoss(
        6,
        smooth=smooth,
        class_weight=WEIGHT,
        label_smoothing=smoothing,
        generator=torch.Generator().manual_seed(0),
    ).double()
    again = torch.Generator().manual_seed(0)
    found = loss.losses(features, logits, target)['task_loss']
    loss.generator.set_state(again.get_state())
    pairs = loss.mixup.pair(features, target, loss.mixup.draw(12))
    soft = (1 - smoothing) * F.one_hot(target, 4).double() + smoothing / 4
    mixtures = [getattr(pairs, part) for part in PARTS[smooth]]
    parts = [weighted(logits, soft), *(weighted(m.mix(logits), m.mix(soft)) for m in mixtures)]
    torch.testing.assert_close(found, sum(parts) / len(parts), rtol=1e-12, atol=0)


@pytest.mark.parametrize('name', [name for name in METHODS if name not in ('l2-sp', 'spd', 'ldifs', 'dr-tune')])
def test_the_cross_entropy_of_every_method_is_weighted(name):
    features, logits, target = batch()
    kwargs = {'smooth': 'none'} if name == 'core' else {}
    loss = create_method(name, 6, class_weight=WEIGHT, **kwargs).double()
    rows = GlobalBatch.create(12, True, False, features.device)
    found = loss.cross_entropy(logits, target, target, rows)
    torch.testing.assert_close(found, weighted(logits, target), rtol=1e-12, atol=0)


def test_excluded_classes_and_weights_of_zero_leave_the_loss_finite():
    features, logits, target = batch()
    logits[:, 3] = -torch.inf
    target = target % 3
    loss = CoreTuningLoss(6, class_weight=[1.0, 1.0, 1.0, 0.0], label_smoothing=0.1).double()
    assert loss.losses(features, logits, target)['task_loss'].isfinite()


def test_pixels_have_the_weight_of_their_class():
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(2, 4, 5, 5, generator=generator)
    target = torch.randint(4, (2, 5, 5), generator=generator)
    target[0, 0] = 255
    found = DenseCrossEntropy(class_weight=WEIGHT)(output, target)
    rows, label = output.movedim(1, -1)[target != 255], target[target != 255]
    torch.testing.assert_close(found, weighted(rows.double(), label).float())


def test_the_task_of_pixels_weighs_all_pixels():
    model = create_segmentation_model('test_resnet', num_classes=4, output_stride=8)
    task = SegmentationTask(model, class_weight=WEIGHT)
    assert task.trainable_module.dense_loss.class_weight.tolist() == WEIGHT.tolist()


def test_weights_are_a_setting_and_no_part_of_the_state():
    assert not [name for name in CoreTuningLoss(6, class_weight=WEIGHT).state_dict() if 'class_weight' in name]


@pytest.mark.parametrize('class_weight', [[1.0, -1.0], [1.0, float('nan')], [[1.0, 2.0]], [float('inf'), 1.0]], ids=str)
def test_bad_weights_are_refused(class_weight):
    with pytest.raises(ValueError, match='Expected class_weight of one finite number >= 0 for each class'):
        CoreTuningLoss(6, class_weight=class_weight)


def test_weights_of_other_classes_are_refused():
    features, logits, target = batch()
    with pytest.raises(ValueError, match='Expected a class_weight for each of the 4 classes, got 3'):
        CoreTuningLoss(6, class_weight=[1.0, 2.0, 3.0]).double().losses(features, logits, target)
