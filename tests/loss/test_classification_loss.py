"""Another loss than cross-entropy on labels of one class: clean images and mixtures get it, with their mixed targets"""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import create_classification_loss

from timm_coretune import SegmentationTask, create_segmentation_model
from timm_coretune.loss import METHODS, CoreTuningLoss, create_method
from timm_coretune.loss.core_tuning import PARTS

CLASSES, DIM = 4, 6
WEIGHT = [0.5, 3.0, 1.0, 2.0]


def batch_of(num_rows=12):
    generator = torch.Generator().manual_seed(3)
    features, logits = (
        torch.randn(num_rows, width, dtype=torch.float64, generator=generator) for width in (DIM, CLASSES)
    )
    return features, logits, torch.randint(CLASSES, (num_rows,), generator=generator)


def bce(logits, target):
    """Weighted binary cross-entropy, entry by entry."""
    total = 0.0
    for row, shares in zip(logits.tolist(), target.tolist(), strict=True):
        for z, t, w in zip(row, shares, WEIGHT, strict=True):
            p = 1 / (1 + math.exp(-z))
            total -= w * (t * math.log(p) + (1 - t) * math.log(1 - p))
    return total / logits.numel()


def poly(logits, target):
    """Poly-1 cross-entropy: -sum t ln p + 2 (1 - sum t p), a row at a time, and the mean of rows."""
    rows = [
        -(t * z.log_softmax(0)).sum().item() + 2 * (1 - (t * z.softmax(0)).sum().item())
        for z, t in zip(logits, target, strict=True)
    ]
    return sum(rows) / len(rows)


LOSSES = {
    'bce': (bce, lambda: create_classification_loss('bce', soft_targets=True, class_weight=WEIGHT).double()),
    'poly': (poly, lambda: create_classification_loss('poly', soft_targets=True)),
}


@pytest.mark.parametrize('smooth', ['both', 'negative', 'none'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('name', LOSSES)
def test_clean_images_and_mixtures_get_the_loss(name, smoothing, smooth):
    expected, create = LOSSES[name]
    features, logits, target = batch_of()
    generator = torch.Generator().manual_seed(0)
    again = generator.get_state()
    loss = CoreTuningLoss(
        DIM, smooth=smooth, label_smoothing=smoothing, classification_loss=create(), generator=generator
    )
    found = loss.double().losses(features, logits, target)['task_loss']
    generator.set_state(again)
    pairs = loss.mixup.pair(features, target, loss.mixup.draw(12))
    soft = (1 - smoothing) * F.one_hot(target, CLASSES).double() + smoothing / CLASSES
    mixtures = [getattr(pairs, part) for part in PARTS[smooth]]
    parts = [expected(logits, soft), *(expected(m.mix(logits), m.mix(soft)) for m in mixtures)]
    assert found.item() == pytest.approx(sum(parts) / len(parts), rel=1e-6)  # shares and poly are float32
    # soft targets stay as they are
    assert loss.cross_entropy(logits, soft, target, loss.prepare(12, logits.device)[0]).item() == pytest.approx(
        parts[0], rel=1e-6
    )


def test_a_batch_of_one_class_has_no_part_of_semi_hard_negatives():
    features, logits, target = batch_of()
    target = torch.ones_like(target)
    loss = CoreTuningLoss(DIM, smooth='negative', classification_loss=LOSSES['bce'][1]()).double()
    found = loss.losses(features, logits, target)['task_loss']
    assert found.item() == pytest.approx(bce(logits, F.one_hot(target, CLASSES).double()), rel=1e-9)


def test_without_mixtures_and_contrast_it_is_the_loss_of_timm():
    features, logits, target = batch_of()
    for name in LOSSES:
        own = create_classification_loss(name, soft_targets=True)
        loss = CoreTuningLoss(DIM, contrast_weight=0, smooth='none', label_smoothing=0.1, classification_loss=own)
        expected = create_classification_loss(name, smoothing=0.1)(logits, target)
        torch.testing.assert_close(loss(features, logits, target), expected, rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize('name', [name for name in METHODS if name not in ('l2-sp', 'spd', 'ldifs', 'coin')])
def test_every_method_takes_it_or_says_that_it_does_not(name):
    features, logits, target = batch_of()
    own = create_classification_loss('bce', soft_targets=True)
    if not METHODS[name].takes_classification_loss:
        with pytest.raises(ValueError, match='Expected no classification_loss, got BinaryCrossEntropy: DRTuneLoss'):
            create_method(name, DIM, classification_loss=own)
        return
    kwargs = {'smooth': 'none'} if name == 'core' else {}
    loss = create_method(name, DIM, classification_loss=own, **kwargs).double()
    found = loss.cross_entropy(logits, target, target, loss.prepare(12, logits.device)[0])
    assert found.item() == pytest.approx(own(logits, F.one_hot(target, CLASSES).double()).item(), rel=1e-9)


def test_weights_belong_to_the_loss_and_pixels_have_none():
    own = create_classification_loss('bce', soft_targets=True)
    with pytest.raises(ValueError, match='Expected no class_weight with a classification_loss'):
        CoreTuningLoss(DIM, classification_loss=own, class_weight=WEIGHT)
    model = create_segmentation_model('test_resnet', num_classes=CLASSES, output_stride=8)
    with pytest.raises(ValueError, match='Expected a loss with the cross-entropy, which leaves pixels out'):
        SegmentationTask(model, CoreTuningLoss(model.num_features, classification_loss=own))
