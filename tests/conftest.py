import logging
import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from commands import run_command
from runs import rows_of
from tiny_data import write_images


def pytest_configure():
    """With pytest-xdist: one thread for this process and for those that tests start, unless the user says otherwise.

    The processes of pytest-xdist share the cores. More threads than cores are slow, and may add up in another order.
    """
    if 'PYTEST_XDIST_WORKER' in os.environ and 'OMP_NUM_THREADS' not in os.environ:
        os.environ['OMP_NUM_THREADS'] = '1'
        torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')


@pytest.fixture(autouse=True)
def _fresh_process():
    """What a new process starts with: the same seed, and nothing that another test has configured."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for handler in list(logging.root.handlers):  # those of programs that ran in earlier tests; pytest's are subclasses
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture
def one_thread():
    """As fresh processes have: with more, sums come out in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def launch(tmp_path):
    """Run the words of a command in a folder of its own, as a user of this environment would."""
    return lambda words, **kwargs: run_command(words, cwd=tmp_path, **kwargs)


@pytest.fixture
def read_csv():
    return rows_of


@pytest.fixture(scope='session')
def tiny_images(tmp_path_factory):
    """The path of a data set that write_images makes with these arguments; not to be changed."""
    paths = {}

    def path_of(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in paths:
            paths[key] = write_images(tmp_path_factory.mktemp('images') / 'images.safetensors', *args, **kwargs)
        return paths[key]

    return path_of


@pytest.fixture
def messages(caplog):
    """What the package logged at a level so far."""
    caplog.set_level(logging.INFO, 'timm_coretune')
    return lambda level='INFO': [record.message for record in caplog.records if record.levelname == level]


@pytest.fixture(scope='module')
def images(tiny_images):
    """26 training and 4 validation images of 2 classes, all different."""
    return tiny_images((13, 13), (2, 2), size=12, names=['even', 'odd'])


@pytest.fixture
def tiny(tiny_images):
    """A data set of 3 classes whose images differ by color, 8 training and 4 validation images a class."""
    return tiny_images((8, 8, 8), (4, 4, 4), names=['red', 'green', 'blue'], noise=60, tint=180)


@pytest.fixture
def data(tiny_images):
    """24 training and 9 validation images: 12, 9, 2 and 1 of each class, and 3, 3, 2 and 1."""
    return tiny_images((12, 9, 2, 1), (3, 3, 2, 1), names=['ant', 'bee', 'cat', 'dog'])
