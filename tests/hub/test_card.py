"""The card of a model, and where a tuned model goes beside the Hub"""

import json
import logging

import pytest
import timm
import torch

from timm_coretune import export_model
from timm_coretune.hub.card import CardFacts, create_card

pytestmark = pytest.mark.usefixtures('one_thread')


def test_a_card_tells_only_what_is_known(model, tmp_path):
    export_model(model, str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    card = create_card('me/my-model', config, CardFacts())
    assert card.data.license is None
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert 'Figures' not in card.text
    assert 'not stated' in card.text
    facts = CardFacts(dataset='owner/data', base_model='timm/resnet50.a1_in1k', license='mit', metrics={'top1': 91.25})
    card = create_card('me/my-model', config, facts)
    assert (card.data.base_model, card.data.datasets) == ('timm/resnet50.a1_in1k', ['owner/data'])
    assert card.data.eval_results[0].metric_value == 91.25


@pytest.mark.parametrize('format', ['torch.export', 'onnx'])
def test_a_tuned_model_goes_where_timm_models_go(run_folder, tmp_path, format):
    weights = str(run_folder / 'model_best.safetensors')
    model = timm.create_model('test_resnet', num_classes=10, checkpoint_path=weights).eval()
    image = torch.randn(2, 3, 32, 32)
    if format == 'onnx':
        pytest.importorskip('onnxscript')
        reference = pytest.importorskip('onnx.reference')
        logging.getLogger('onnxscript').setLevel(logging.ERROR)
        torch.onnx.export(model, (image,), str(tmp_path / 'model.onnx'), dynamo=True, input_names=['image'])
        (output,) = reference.ReferenceEvaluator(str(tmp_path / 'model.onnx')).run(None, {'image': image.numpy()})
        output = torch.from_numpy(output)
    else:
        torch.export.save(torch.export.export(model, (image,)), tmp_path / 'model.pt2')
        output = torch.export.load(tmp_path / 'model.pt2').module()(image)
    torch.testing.assert_close(output, model(image), rtol=1e-4, atol=1e-4)
