"""Looks at the images of a run with its model, and with the model that it started from"""

import dataclasses
import logging
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

from ..checks import clip
from ..data.seeding import seeded
from ..evaluation.confusion import ConfusionMatrix
from ..evaluation.features import knn_predict, measure_features
from ..prediction.classifier import Classifier
from ..prediction.predictor import Predictor
from ..redaction import redact
from ..train.classification import create_model, open_datasets
from ..train.cli.settings import Settings
from ..train.data.datasets import Datasets
from .html import embed
from .images import Mistake, Neighbour
from .look import Looked, look
from .maps import FeatureSet

_logger = logging.getLogger(__name__)

_MOST_MISTAKES = 24
_NEIGHBOURS = 5  # pictures of training images below each mistake


class Findings(NamedTuple):
    """What was found in the images of a run.

    Attributes:
        class_names: Names of the classes.
        source: Sentence that tells which images were looked at.
        labels: Classes of the held-out images (N,).
        confusion: How often each class was predicted as each other (C, C).
        mistakes: The most confident mistakes.
        num_mistakes: Number of mistakes.
        sets: Features of the held-out images: before the run if there is a model of that time, and after.
        no_before: Why there is no model of before, '' if there is.
    """

    class_names: List[str]
    source: str
    labels: torch.Tensor
    confusion: torch.Tensor
    mistakes: List[Mistake]
    num_mistakes: int
    sets: List[FeatureSet]
    no_before: str


def why(error: BaseException) -> str:
    """The message of an error as a sentence of a page."""
    return clip(redact(f'{error}' or type(error).__name__), 300).rstrip('.')


def examine(
    settings: Settings, folder: str, start: str, device: Optional[Union[str, torch.device]], max_images: int
) -> Findings:
    """Look at images that were held out, and at training images to compare them with.

    Args:
        settings: Settings of the run.
        folder: The run folder.
        start: What the run started from, in words.
        device: Device to compute on. When None a GPU if there is one.
        max_images: Number of images of each split to look at, at most.

    Raises:
        ValueError: The images cannot be opened, or cannot be looked at one by one.
    """
    if settings.data.is_multi_label:
        raise ValueError('images have several labels, for which there are no mistakes and neighbours of one class')
    # images that cannot be read are left out where they are met
    unchecked = dataclasses.replace(settings.data, check_images='none')
    datasets = open_datasets(dataclasses.replace(settings, data=unchecked))
    if datasets.validation is None:
        raise ValueError('no images were held out')
    after = Predictor(folder, device, topk=1)
    before, no_before = _load_start(settings, datasets, after)
    models = [after, *([] if before is None else [before])]
    held_out = look(datasets.validation, models, max_images, 'held-out images')
    bank = None if datasets.train is None else look(datasets.train, models, max_images, 'training images')
    titles = [('after', 'the best weights of the run'), ('before', start)]
    sets = []
    for index, features in reversed(list(enumerate(held_out.features))):
        figures: Dict[str, float] = {}
        if bank is not None:
            figures = measure_features(features, held_out.labels, bank.features[index], bank.labels)
        sets.append(FeatureSet(*titles[index], features, figures))
    confusion = ConfusionMatrix(len(after.class_names))
    confusion.update(held_out.predicted, held_out.labels)
    source = f'Looked at: {held_out.source}{"" if bank is None else f", and {bank.source}"}.'
    mistakes, num_mistakes = _find_mistakes(held_out, bank, after.class_names)
    return Findings(
        after.class_names, source, held_out.labels, confusion.compute(), mistakes, num_mistakes, sets, no_before
    )


def _load_start(settings: Settings, datasets: Datasets, after: Predictor) -> Tuple[Optional[Predictor], str]:
    """The model that the run started from, or why it cannot be had."""
    try:
        num_classes = settings.model.num_classes or datasets.num_classes
        with seeded(settings.loop.seed, after.device):  # as the run, for weights that no checkpoint has
            model, _ = create_model(settings, num_classes, verbose=False)
        model.eval().to(after.device).to(memory_format=torch.channels_last)
        started = Classifier(model, after.data_config, after.class_names, after.multi_label)
        return Predictor(started, after.device, topk=1), ''
    except Exception as e:  # of the Hub, of files that are gone, of a model that timm has no longer
        _logger.warning(f'The report shows no features of before the run: {e}')
        return None, why(e)


def _find_mistakes(held_out: Looked, bank: Optional[Looked], names: Sequence[str]) -> Tuple[List[Mistake], int]:
    """The most confident mistakes with the training images next to them, and the number of all mistakes."""
    wrong = (held_out.predicted != held_out.labels).nonzero().flatten()
    order = held_out.probability[wrong].argsort(descending=True, stable=True)
    shown = wrong[order][:_MOST_MISTAKES]
    near: List[List[Neighbour]] = [[] for _ in shown]
    if bank is not None and len(shown):
        queries = held_out.features[0][shown]
        count = min(_NEIGHBOURS, len(bank.labels))
        _, rows = knn_predict(queries, bank.features[0], bank.labels, len(names), count)
        cosines = F.cosine_similarity(queries[:, None], bank.features[0][rows], dim=2)
        near = [
            [
                Neighbour(embed(bank.dataset[bank.indices[row]][0], 56), names[int(bank.labels[row])], cosine)
                for row, cosine in zip(of_image, of_cosine, strict=True)
            ]
            for of_image, of_cosine in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]
    mistakes = [
        Mistake(
            embed(held_out.dataset[held_out.indices[place]][0]),
            names[int(held_out.labels[place])],
            names[int(held_out.predicted[place])],
            float(held_out.probability[place]),
            neighbours,
        )
        for place, neighbours in zip(shown.tolist(), near, strict=True)
    ]
    return mistakes, len(wrong)
