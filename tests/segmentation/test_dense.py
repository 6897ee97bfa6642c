"""The cross-entropy of all pixels"""

import pytest
import torch
from segmentation_reference import IGNORED, dense_cross_entropy

from timm_coretune.segmentation.dense import DenseCrossEntropy

NUM_CLASSES = 5


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
@pytest.mark.parametrize('ignored', [0.0, 0.4])
def test_dense_cross_entropy_is_the_mean_over_the_pixels_that_count(label_smoothing, ignored):
    output = torch.randn(3, NUM_CLASSES, 5, 7, dtype=torch.float64) * 3
    target = torch.randint(NUM_CLASSES, (3, 5, 7))
    target[torch.rand(target.shape) < ignored] = IGNORED
    found = DenseCrossEntropy(IGNORED, label_smoothing)(output, target)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(dense_cross_entropy(output, target, label_smoothing), rel=1e-12)


def test_dense_cross_entropy_of_half_precision_is_computed_in_float32():
    output, target = torch.randn(2, NUM_CLASSES, 4, 4).bfloat16() * 4, torch.randint(NUM_CLASSES, (2, 4, 4))
    found = DenseCrossEntropy()(output, target)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(dense_cross_entropy(output, target), rel=1e-6)


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_dense_cross_entropy_of_ignored_pixels_is_zero_with_zero_gradients(label_smoothing):
    output = torch.randn(2, NUM_CLASSES, 3, 3, requires_grad=True)
    loss = DenseCrossEntropy(IGNORED, label_smoothing)(output, torch.full((2, 3, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(output.grad, torch.zeros_like(output))
