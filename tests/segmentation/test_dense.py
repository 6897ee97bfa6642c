"""The cross-entropy of all pixels"""

import pytest
import torch
import torch.nn as nn
from ranks import launch_ranks
from segmentation_reference import IGNORED, dense_cross_entropy
from segmentation_task_worker import WORLD_SIZE

from timm_coretune.segmentation import SegmentationTask, create_segmentation_model
from timm_coretune.segmentation.dense import DenseCrossEntropy, check_masks

NUM_CLASSES = 5

A = 6  # anchors of an image


def create_task(head='fcn', mixup_enabled=True, dtype=torch.float64, backbone='test_resnet', **kwargs):
    torch.manual_seed(0)
    backbone_kwargs = {'output_stride': 8} if backbone == 'test_resnet' else {}
    model = create_segmentation_model(backbone, NUM_CLASSES, head, img_size=(32, 32), **backbone_kwargs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    kwargs = {'contrast_weight': 0.7, 'temperature': 0.2, 'projection_dim': 8, 'anchors_per_image': A, **kwargs}
    task = SegmentationTask(
        model.to(dtype), dtype=dtype, verbose=False, generator=torch.Generator().manual_seed(1), **kwargs
    )
    task.mixup.mixup_enabled = mixup_enabled
    return task.train()


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


@pytest.mark.parametrize(
    ('target', 'told'),
    [
        (torch.zeros(2, 8, 9, dtype=torch.int64), r'int64 \(2, 8, 8\).*int64 \(2, 8, 9\)'),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r'\(3, 8, 8\)'),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), r'\(2, 1, 8, 8\)'),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), r'uint8'),
        (torch.zeros(2, 8, 8), r'float32'),
        (torch.full((2, 8, 8), 5), r'\[0, 4\], or 255 .* got 5'),
        (torch.full((2, 8, 8), -1), r'got -1'),
        (torch.full((2, 8, 8), 256), r'got 256'),
    ],
    ids=['width', 'batch size', 'channel', 'uint8', 'float', 'class', 'negative', 'beyond'],
)
def test_masks_that_do_not_fit_are_refused(target, told):
    images = torch.zeros(2, 3, 8, 8)
    check_masks(torch.full((2, 8, 8), 4), images, 5, IGNORED)
    check_masks(torch.full((2, 8, 8), IGNORED), images, 5, IGNORED)
    with pytest.raises(ValueError, match=told):
        check_masks(target, images, 5, IGNORED)
    with pytest.raises(ValueError, match=told):
        create_task()(images.double(), target)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """Function of a scenario's name: what each of the processes found in every update."""
    ranks = launch_ranks('segmentation_task_worker.py', WORLD_SIZE, tmp_path_factory.mktemp('ranks'))
    return lambda name: [rank[name] for rank in ranks]
