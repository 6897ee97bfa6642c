"""Write predictions as CSV, JSON or Parquet, and features as NumPy or Parquet"""

import csv
import json
import os
from typing import Any, Dict, List, Sequence

import numpy as np
import torch

from ..atomic import write_whole
from ..data.columns import import_pyarrow
from .predictor import Prediction

TABLE_ENDINGS = ('.csv', '.json', '.parquet')
FEATURE_ENDINGS = ('.npy', '.parquet')


def check_ending(path: str, endings: Sequence[str]) -> None:
    """Raise a ValueError unless a file of this name can be written."""
    ending = os.path.splitext(path)[1].lower()
    folder = os.path.dirname(path) or '.'
    if ending not in endings:
        raise ValueError(f'Expected a file that ends in {", ".join(endings)}, got {path!r}.')
    if not os.path.isdir(folder):
        raise ValueError(f'Expected a folder for {path!r}, there is no {folder!r}. Create it.')
    if ending == '.parquet':
        import_pyarrow()


def rows_of(images: Sequence[str], predictions: Sequence[Prediction]) -> List[Dict[str, Any]]:
    """A row for each image: its path, label_1, probability_1 and so on, and what is wrong with it."""
    topk = max((len(prediction.labels) for prediction in predictions), default=0)
    rows = []
    for image, prediction in zip(images, predictions, strict=True):
        row: Dict[str, Any] = {'image': image}
        for rank in range(topk):
            row[f'label_{rank + 1}'] = prediction.labels[rank] if prediction.labels else None
            row[f'probability_{rank + 1}'] = prediction.probabilities[rank] if prediction.labels else None
        rows.append({**row, 'error': prediction.error})
    return rows


def write_predictions(path: str, images: Sequence[str], predictions: Sequence[Prediction]) -> None:
    """Write a table with a row for each image, in the format of the ending. It is written whole or not at all."""
    rows = rows_of(images, predictions)
    ending = os.path.splitext(path)[1].lower()
    with write_whole(path) as temporary:
        if ending == '.parquet':
            pyarrow = import_pyarrow()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
            return
        with open(temporary, 'w', newline='', encoding='utf-8') as f:
            if ending == '.json':
                json.dump(rows, f, indent=2)
                return
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def write_features(path: str, images: Sequence[str], features: torch.Tensor) -> None:
    """Write features (N, D): a matrix in a .npy, or a table of paths and lists in a .parquet."""
    with write_whole(path) as temporary:
        if path.lower().endswith('.npy'):
            with open(temporary, 'wb') as f:  # np.save would append an ending to the name
                np.save(f, features.numpy())
            return
        pyarrow = import_pyarrow()
        columns = {'image': list(images), 'features': list(features.numpy())}
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
