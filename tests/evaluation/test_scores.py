"""What is known of a score stands in one table, which knows the scores of all evaluators"""

import re
from pathlib import Path

import pytest
import torch

import timm_coretune
from timm_coretune.evaluation.classification import ClassificationEvaluator
from timm_coretune.evaluation.multi_label import MultiLabelEvaluator
from timm_coretune.evaluation.scores import (
    FURTHER_OF_IMAGES,
    OF_LABEL_SETS,
    OF_PIXELS,
    SCORES,
    describe,
    is_better,
    scores_of_images,
)
from timm_coretune.evaluation.segmentation import SegmentationEvaluator


def test_every_score_of_an_evaluator_is_in_the_table_and_the_other_way_round():
    images = ClassificationEvaluator(None, tuple(FURTHER_OF_IMAGES), 3)
    images.update(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    pixels = SegmentationEvaluator(3)
    pixels.update(torch.randn(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 0]]]))
    several = MultiLabelEvaluator()
    several.update(torch.randn(4, 3), torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]))
    of_images, of_pixels, of_label_sets = images.compute(), pixels.compute(), several.compute()
    assert set(of_images) == set(scores_of_images(tuple(FURTHER_OF_IMAGES)))
    assert set(of_pixels) == set(OF_PIXELS)
    assert set(of_label_sets) == set(OF_LABEL_SETS)
    assert set(of_images) | set(of_pixels) | set(of_label_sets) == set(SCORES)
    for evaluator, scores in ((images, of_images), (pixels, of_pixels), (several, of_label_sets)):
        assert evaluator.describe(scores).startswith(f'Loss: {scores["loss"]:>7.3f}  ')


@pytest.mark.parametrize('name', SCORES)
def test_a_better_score_is_higher_but_for_errors_and_losses(name):
    sign = -1 if name in ('loss', 'ece') else 1
    assert is_better(name, 1.0, None)
    assert is_better(name, 2.0 * sign, 1.0 * sign)
    assert not is_better(name, 1.0 * sign, 2.0 * sign)
    assert not is_better(name, 1.0, 1.0)


def test_a_line_of_the_log_shows_the_scores_in_their_order():
    assert describe({'top1': 50.0, 'loss': 1.25, 'ece': 3}, ('loss', 'top1')) == 'Loss:   1.250  Acc@1:  50.000'


def test_titles_labels_and_types_of_the_hub_stand_nowhere_else():
    root = Path(timm_coretune.__file__).parent
    sources = {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob('*.py')}
    words = {word for score in SCORES.values() for word in (score.title, score.label, score.hub_type)}
    words = {word for word in words if re.search(r'[A-Z_@]', word)} - {'Loss', 'F1', 'PA', 'mIoU', 'FWIoU', 'MPA'}
    assert len(words) > 10
    for word in words:
        assert [file for file, text in sources.items() if f"'{word}'" in text] == ['evaluation/scores.py'], word
