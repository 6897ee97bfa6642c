"""A new classifier behind a checkpoint starts with logits of a usual size"""

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.model import create_backbone


def start_of(model, tmp_path, *flags):
    """The classifier's weights of train.py and of timm from the same seed."""
    path = tmp_path / 'backbone.safetensors'
    save_file(timm.create_model(model, num_classes=0).state_dict(), path)
    settings = parse_args(['--model', model, '--pretrained-path', str(path), *flags]).settings
    torch.manual_seed(1)
    found = create_backbone(settings.model, 8, settings.data).get_classifier().weight
    torch.manual_seed(1)
    return found.detach(), timm.create_model(model, num_classes=8).get_classifier().weight.detach()


def test_one_that_timm_starts_wide_is_scaled_to_the_spread_of_a_layer_of_torch(tmp_path, messages):
    found, timms = start_of('test_efficientnet', tmp_path)
    expected = torch.nn.Linear(10**4, 8).weight.std() * (10**4 / found.shape[1]) ** 0.5
    assert found.std() == pytest.approx(expected.item(), rel=0.05)
    assert timms.std() > 3 * found.std()
    torch.testing.assert_close(found / found.std(), timms / timms.std())
    assert sum('new classifier were scaled down' in message for message in messages()) == 1


@pytest.mark.parametrize(
    'model, flags, factor',
    [
        ('test_efficientnet', ['--head-init-scale', '1'], 1),
        ('test_efficientnet', ['--head-init-scale', '0.5'], 0.5),
        ('test_resnet', [], 1),
        ('test_vit', [], 1),
    ],
)
def test_others_and_those_with_a_scale_of_their_own_are_timms(tmp_path, messages, model, flags, factor):
    found, timms = start_of(model, tmp_path, *flags)
    assert torch.equal(found, timms * factor)
    assert not any('scaled down' in message for message in messages())
