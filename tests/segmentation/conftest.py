import pytest
from segmentation_models import tuned

from timm_coretune.segmentation import export_segmentation_model


@pytest.fixture
def exported(tmp_path):
    model = tuned('test_resnet', output_stride=8)
    data_config = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.1), 'interpolation': 'bilinear'}
    export_segmentation_model(model, str(tmp_path / 'model'), data_config, ['a', 'b', 'c', 'd'])
    return tmp_path / 'model'
