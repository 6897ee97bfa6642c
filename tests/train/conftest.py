import pytest


@pytest.fixture
def tiny(tiny_images):
    """A data set of 3 classes whose images differ by color, 8 training and 4 validation images a class."""
    return tiny_images((8, 8, 8), (4, 4, 4), names=['red', 'green', 'blue'], noise=60, tint=180)


@pytest.fixture
def data(tiny_images):
    """24 training and 9 validation images: 12, 9, 2 and 1 of each class, and 3, 3, 2 and 1."""
    return tiny_images((12, 9, 2, 1), (3, 3, 2, 1), names=['ant', 'bee', 'cat', 'dog'])
