"""The bundled checkpoint, which is loaded when nothing else is named"""

from importlib import resources

import timm
import torch
from safetensors.torch import load_file

from timm_coretune import inspect_checkpoint, load_checkpoint

SAMPLE = str(resources.files('timm_coretune') / 'assets' / 'test_resnet_mocov2.safetensors')


def test_the_bundled_file_gives_the_query_encoder():
    tensors = load_file(SAMPLE)
    model = timm.create_model('test_resnet', num_classes=10)
    report = load_checkpoint(model, SAMPLE)
    assert (report.method, report.copy) == ('MoCo v1/v2, PCL', 'query encoder')
    assert torch.equal(model.conv1[0].weight, tensors['module.encoder_q.conv1.0.weight'])
    assert not torch.equal(model.conv1[0].weight, tensors['module.encoder_k.conv1.0.weight'])
    assert report.data_config['mean'] == (0.5, 0.5, 0.5)  # as its own metadata says


def test_its_architecture_is_found():
    assert inspect_checkpoint(SAMPLE).architecture == 'test_resnet'
