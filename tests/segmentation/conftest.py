import shutil

import pytest
from segmentation_models import tuned

from timm_coretune.segmentation import export_segmentation_model


@pytest.fixture(scope='session')
def exported_once(tmp_path_factory):
    model = tuned('test_resnet', output_stride=8)
    data_config = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.1), 'interpolation': 'bilinear'}
    folder = tmp_path_factory.mktemp('exported') / 'model'
    export_segmentation_model(model, str(folder), data_config, ['a', 'b', 'c', 'd'])
    return folder


@pytest.fixture
def exported(exported_once, tmp_path):
    """A folder of a segmentation model, which the test may change."""
    return shutil.copytree(exported_once, tmp_path / 'model')
