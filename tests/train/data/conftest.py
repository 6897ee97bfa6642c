import pytest


@pytest.fixture(scope='module')
def images(tiny_images):
    """26 training and 4 validation images of 2 classes, all different."""
    return tiny_images((13, 13), (2, 2), size=12, names=['even', 'odd'])
