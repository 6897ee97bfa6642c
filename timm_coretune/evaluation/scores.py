"""The scores of a validation: the names of each, its unit, and whether a higher value is better

All code that shows, ranks or publishes a score reads this table.
"""

import math
from typing import Dict, Mapping, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch

PERCENT, NATS = '%', 'nats'


class Score(NamedTuple):
    """Description of a score.

    Attributes:
        title: Name of the score in a table or below a picture.
        label: Short name of the score in a log line.
        unit: Unit of the score, PERCENT or NATS.
        higher_is_better: Whether a higher value is better.
        hub_type: Metric type of the score on the Hugging Face Hub.
    """

    title: str
    label: str
    unit: str
    higher_is_better: bool
    hub_type: str


# The key is the name of the column in summary.csv without `eval_`. The order is that of a model card.
SCORES: Dict[str, Score] = {
    'top1': Score('Top-1 accuracy', 'Acc@1', PERCENT, True, 'accuracy'),
    'top5': Score('Top-5 accuracy', 'Acc@5', PERCENT, True, 'top_5_accuracy'),
    'map': Score('Mean average precision', 'mAP', PERCENT, True, 'mean_average_precision'),
    'micro_f1': Score('Micro F1', 'micro F1', PERCENT, True, 'f1'),
    'sample_f1': Score('Mean F1 of the images', 'sample F1', PERCENT, True, 'f1'),
    'macro_f1': Score('Macro F1', 'F1', PERCENT, True, 'f1'),
    'ece': Score('Expected calibration error', 'ECE', PERCENT, False, 'expected_calibration_error'),
    'miou': Score('mIoU', 'mIoU', PERCENT, True, 'mean_iou'),
    'pa': Score('Pixel accuracy', 'PA', PERCENT, True, 'pixel_accuracy'),
    'mpa': Score('Mean accuracy of the classes', 'MPA', PERCENT, True, 'mean_accuracy'),
    'fwiou': Score('Frequency-weighted IoU', 'FWIoU', PERCENT, True, 'frequency_weighted_iou'),
    'loss': Score('Cross-entropy', 'Loss', NATS, False, 'loss'),
}
# scores of every image classifier
OF_IMAGES = ('loss', 'top1', 'top5')
# values of --metrics, with the score that each adds; None adds a table only
FURTHER_OF_IMAGES: Dict[str, Optional[str]] = {'confusion': None, 'per-class': 'macro_f1', 'ece': 'ece'}
# scores of every classifier of images with several labels
OF_LABEL_SETS = ('loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1')
# values of --metrics for it, which add tables only
FURTHER_OF_LABEL_SETS = ('per-class', 'predictions')
# scores of every segmentation model
OF_PIXELS = ('loss', 'miou', 'pa', 'mpa', 'fwiou')


class Evaluator(Protocol):
    """What a validation measures, such as a ClassificationEvaluator."""

    def reset(self) -> None: ...

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take logits in float32 and targets of a batch, int64, or multi-hot in float32."""

    def compute(self) -> Dict[str, float]:
        """The scores by name, over all processes."""

    def describe(self, scores: Mapping[str, float]) -> str:
        """The part of a line of the log that tells what compute returned."""

    def write(self, folder: str) -> None:
        """Write its tables, if it has any."""


def scores_of_images(metrics: Sequence[str] = ()) -> Tuple[str, ...]:
    """List the scores of an image classifier, including those that the requested metrics add."""
    return (*OF_IMAGES, *(score for name, score in FURTHER_OF_IMAGES.items() if score and name in metrics))


def for_ranking(name: str, value: float) -> float:
    """A value of a score as it is ranked: NaN, which compares with nothing, is the worst of all."""
    if not math.isnan(value):
        return value
    return -math.inf if SCORES[name].higher_is_better else math.inf


def is_better(name: str, value: float, other: Optional[float]) -> bool:
    """Whether a value of a score is better than another. Any value is better than None, any but NaN than NaN."""
    if other is None:
        return True
    value, other = for_ranking(name, value), for_ranking(name, other)
    return value > other if SCORES[name].higher_is_better else value < other


def describe(values: Mapping[str, float], names: Sequence[str]) -> str:
    """Write some of the scores as a part of a log line."""
    return '  '.join(f'{SCORES[name].label}: {values[name]:>7.3f}' for name in names)


def describe_value(name: str, value: float) -> str:
    """A value of a score with its name and unit, as in `top1 87.50 %`."""
    unit = SCORES[name].unit
    return f'{name} {value:.2f} {unit}' if unit == PERCENT else f'{name} {value:.4g} {unit}'
