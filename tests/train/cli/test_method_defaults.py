"""Flags that several methods share have the default of the method"""

import pytest
import yaml

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.settings import LossSettings


@pytest.mark.parametrize(
    'flags, weight, temperature',
    [
        ('', 0.1, 0.07),
        ('--coretune', 0.1, 0.07),
        ('--method scl', 0.1, 0.07),
        ('--method bcl', 0.35, 0.07),
        ('--method coin', 0.1, 0.3),
        ('--method coin --contrast-temperature 0.07 --contrast-weight 0.5', 0.5, 0.07),
    ],
)
def test_weight_and_temperature_are_those_of_the_method_unless_given(tmp_path, flags, weight, temperature):
    parsed = parse_args(['--data-dir', str(tmp_path), *flags.split()])
    loss, saved = parsed.settings.loss, yaml.safe_load(parsed.text)
    assert (loss.contrast_weight, loss.contrast_temperature, loss.projection_dim) == (weight, temperature, 256)
    assert (saved['contrast_weight'], saved['contrast_temperature']) == (weight, temperature)
    if loss.task_loss:
        kwargs = loss.loss_kwargs()
        assert (kwargs['contrast_weight'], kwargs['temperature']) == (weight, temperature)


def test_settings_made_by_hand_have_them_too():
    assert LossSettings(method='coin').loss_kwargs()['temperature'] == 0.3
    assert LossSettings(method='coin', contrast_temperature=0.2).loss_kwargs()['temperature'] == 0.2
    assert 'temperature' not in LossSettings(method='l2-sp', method_kwargs={'weight': 0.5}).loss_kwargs()
