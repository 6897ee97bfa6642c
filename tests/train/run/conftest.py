import pytest


@pytest.fixture(scope='module')
def straight(request, data, tmp_path_factory):
    """The folder of an uninterrupted run of `train` of the test file, with these flags more. It runs once."""
    folders = {}

    def run(*flags):
        if flags not in folders:
            folders[flags] = request.module.train(data, tmp_path_factory.mktemp('straight'), *flags)
        return folders[flags]

    return run
