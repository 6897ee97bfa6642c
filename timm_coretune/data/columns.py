"""Reads the columns of CSV and Parquet files"""

import csv
import os
from itertools import islice
from typing import Any, Dict, List, Sequence

TABLE_ENDINGS = ('.csv', '.tsv', '.parquet')


def is_table(path: str) -> bool:
    """Whether a path has the ending of a file with columns."""
    return path.lower().endswith(TABLE_ENDINGS)


def import_pyarrow() -> Any:
    """pyarrow with its module for Parquet, which an extra brings.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ValueError("Parquet files need pyarrow: pip install 'timm-coretune[parquet]'") from e
    return pyarrow


def read_names(path: str) -> List[str]:
    """Names of the columns of a file.

    Raises:
        ValueError: The file cannot be read, or has a name twice.
    """
    if path.lower().endswith('.parquet'):
        names = _read_parquet(path, lambda parquet: parquet.read_schema(path).names)
    else:
        names = next(iter(_read_lines(path, only_first=True)), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'Expected columns of different names in {path!r}, several are called {", ".join(twice)}.')
    return names


def read_columns(path: str, names: Sequence[str]) -> Dict[str, List[Any]]:
    """Values of some columns by their names. Those of a CSV file are strings, those that are missing in Parquet None.

    Raises:
        ValueError: The file cannot be read, or a line has more or fewer values than the first.
    """
    if path.lower().endswith('.parquet'):
        return _read_parquet(path, lambda parquet: parquet.read_table(path, columns=list(names)).to_pydict())
    header, *rows = _read_lines(path)
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(
                f'Expected {len(header)} values in each row of {path!r}, as its first line names, row {number} below '
                f'it has {len(row)}: {str(row)[:200]}. A value that contains the separator needs quotes.'
            )
    places = [header.index(name) for name in names]
    return {name: [row[place] for row in rows] for name, place in zip(names, places, strict=True)}


def _read_parquet(path: str, read: Any) -> Any:
    pyarrow = import_pyarrow()
    try:
        return read(pyarrow.parquet)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'Expected a Parquet file in {path!r}, could not read it: {e}') from e


def _read_lines(path: str, only_first: bool = False) -> List[List[str]]:
    """The lines of a CSV file that are not empty. The separator is the one that is most frequent in the first."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            first = f.readline()
            f.seek(0)
            separator = max(',;\t', key=first.count)
            rows = filter(None, csv.reader(f, delimiter=separator, skipinitialspace=True, strict=True))
            return list(islice(rows, 1 if only_first else None))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f'Expected a CSV file in UTF-8 in {os.fspath(path)!r}, could not read it: {e}.') from e
