import sys
from pathlib import Path

import pytest


@pytest.fixture
def run_script(monkeypatch):
    """Calls the main function of a script with the words of a command."""

    def run(script, *words):
        monkeypatch.setattr(sys, 'argv', [script.__name__, *map(str, words)])
        script.main()

    return run


@pytest.fixture
def bytes_of():
    """The bytes of every file in a folder, by its path."""

    def read(folder):
        files = (path for path in Path(folder).rglob('*') if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read
