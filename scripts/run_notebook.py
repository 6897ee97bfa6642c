"""Run a notebook in a fresh kernel and store its outputs in it

python scripts/run_notebook.py examples/fine_tune.ipynb

Needs nbclient and ipykernel: pip install -e '.[test,test-formats]'.
"""

import os
import sys
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient


def execute(path: str, folder: str) -> Any:
    """The notebook with the outputs of a new run in a folder. Warnings and progress bars are left out.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name='python3',
        coalesce_streams=True,
        record_timing=False,
        resources={'metadata': {'path': folder}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
    notebook.metadata['language_info'] = {'name': 'python'}  # not the version of this machine
    return notebook


def main(path: str) -> None:
    with TemporaryDirectory() as folder:
        notebook = execute(os.path.abspath(path), folder)
    nbformat.write(notebook, path)


if __name__ == '__main__':
    main(sys.argv[1])
