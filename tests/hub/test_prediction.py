"""A run that was pushed predicts what the run predicts, from a process that has only the Hub"""

import json

import numpy as np
import pytest
from PIL import Image

from timm_coretune.hub.push import push_run
from timm_coretune.prediction import Predictor

CODE = """
import json
from timm_coretune.prediction import Predictor
try:
    predictor = Predictor({source!r}, 'cpu')
    print(json.dumps([predictor('image.png')[0]._asdict(), predictor.multi_label]))
except ValueError as e:
    print(e)
"""


@pytest.mark.slow
def test_a_pushed_run_predicts_as_the_run_does(hub, run_folder, run_python, tmp_path):
    push_run(str(run_folder), 'me/run')
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    (expected,) = Predictor(run_folder, 'cpu')(tmp_path / 'image.png')
    found, multi_label = json.loads(run_python(CODE.format(source='hf-hub:me/run')))
    assert found['labels'] == expected.labels
    assert found['probabilities'] == pytest.approx(expected.probabilities, rel=1e-6)
    assert not multi_label
    # the files are then in the cache
    again, _ = json.loads(run_python(CODE.format(source='hf-hub:me/run'), HF_HUB_OFFLINE='1'))
    assert again == found
    absent = run_python(CODE.format(source='hf-hub:me/none'))
    assert absent.startswith('Expected a repository of the Hub in hf-hub:me/none, got RepositoryNotFoundError')
