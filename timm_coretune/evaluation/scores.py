"""The scores of a validation: what each is called, its unit, and whether more of it is better

Everything that shows, ranks or publishes a score reads this table.
"""

from typing import Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

PERCENT, NATS = '%', 'nats'


class Score(NamedTuple):
    """What is known of a score.

    Attributes:
        title: Its name in a table or below a picture.
        label: Its name in a line of the log.
        unit: Its unit.
        higher_is_better: Whether a higher value is a better one.
        hub_type: Its metric type on the Hugging Face Hub.
    """

    title: str
    label: str
    unit: str
    higher_is_better: bool
    hub_type: str


# by the name in summary.csv behind eval_, in the order of a model card
SCORES: Dict[str, Score] = {
    'top1': Score('Top-1 accuracy', 'Acc@1', PERCENT, True, 'accuracy'),
    'top5': Score('Top-5 accuracy', 'Acc@5', PERCENT, True, 'top_5_accuracy'),
    'macro_f1': Score('Macro F1', 'F1', PERCENT, True, 'f1'),
    'ece': Score('Expected calibration error', 'ECE', PERCENT, False, 'expected_calibration_error'),
    'miou': Score('mIoU', 'mIoU', PERCENT, True, 'mean_iou'),
    'pa': Score('Pixel accuracy', 'PA', PERCENT, True, 'pixel_accuracy'),
    'mpa': Score('Mean accuracy of the classes', 'MPA', PERCENT, True, 'mean_accuracy'),
    'fwiou': Score('Frequency-weighted IoU', 'FWIoU', PERCENT, True, 'frequency_weighted_iou'),
    'loss': Score('Cross-entropy', 'Loss', NATS, False, 'loss'),
}
OF_IMAGES = ('loss', 'top1', 'top5')
# what --metrics asks for, and the score that it brings
FURTHER_OF_IMAGES: Dict[str, Optional[str]] = {'confusion': None, 'per-class': 'macro_f1', 'ece': 'ece'}
OF_PIXELS = ('loss', 'miou', 'pa', 'mpa', 'fwiou')


def scores_of_images(metrics: Sequence[str] = ()) -> Tuple[str, ...]:
    """Names of the scores of a classification, with those that the metrics bring."""
    return (*OF_IMAGES, *(score for name, score in FURTHER_OF_IMAGES.items() if score and name in metrics))


def is_better(name: str, value: float, other: Optional[float]) -> bool:
    """Whether a value of a score is better than another; any is better than none."""
    if other is None:
        return True
    return value > other if SCORES[name].higher_is_better else value < other


def describe(values: Mapping[str, float], names: Sequence[str]) -> str:
    """The part of a line of the log that shows some of the scores."""
    return '  '.join(f'{SCORES[name].label}: {values[name]:>7.3f}' for name in names)
