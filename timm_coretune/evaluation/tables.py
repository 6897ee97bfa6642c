"""CSV files with a table of the classes: confusion matrix, scores of each class"""

import csv
import io
from typing import Any, Dict, List, Optional, Sequence

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
