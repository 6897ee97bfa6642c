"""CSV files with a table of the classes: confusion matrix, scores of each class"""

import csv
import io
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..atomic import write_text


def complete_names(class_names: Optional[Sequence[str]], num_classes: int) -> List[str]:
    """List a name for every class. A class without a name is called by its index."""
    known = class_names or []
    return [known[i] if i < len(known) else str(i) for i in range(num_classes)]


def write_confusion(path: str, class_names: Sequence[str], matrix: Sequence[Sequence[int]]) -> None:
    """Write a confusion matrix with a row for each true class and a column for each predicted class."""
    header = ['true / predicted', *class_names]
    rows = [[name, *row] for name, row in zip(class_names, matrix, strict=True)]
    _write_csv(path, [header, *rows])


def write_records(path: str, records: Sequence[Dict[str, Any]]) -> None:
    """Write a row for each record. All records have the same keys, which become the header. NaN becomes empty."""
    rows = [['' if value != value else value for value in record.values()] for record in records]
    _write_csv(path, [list(records[0]), *rows])


def _write_csv(path: str, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(text.getvalue(), path)


def read_confusion(path: str) -> Tuple[List[str], List[List[int]]]:
    """Read a table that `write_confusion` has written: the names of the classes, and a row for each true class."""
    with open(path, newline='', encoding='utf-8') as f:
        (_, *names), *rows = csv.reader(f)
    return names, [[int(value) for value in values] for _, *values in rows]


def read_records(path: str) -> List[Dict[str, Any]]:
    """Read what `write_records` has written. The first column is a name, the others are numbers, NaN if empty."""
    with open(path, newline='', encoding='utf-8') as f:
        (first, *others), *rows = csv.reader(f)
    return [{first: row[0], **{k: float(v or 'nan') for k, v in zip(others, row[1:], strict=True)}} for row in rows]
