"""Annotations with parts taken out or exchanged at random: converted, or refused in a sentence"""

import copy
import json
import math

import numpy as np
import pytest
from annotations import write_coco, write_json, write_labelme

from timm_coretune.segmentation.convert.coco import open_coco
from timm_coretune.segmentation.convert.labelme import open_labelme

JUNK = (
    *(None, True, -1, 0, 1, 10**30, 1.5, math.nan, math.inf, -1e308, '', 'x', '../a.jpg', 'a\0.jpg', '\ud800'),
    *('a' * 10**5, [], {}, [[]], [[[]]], [{}], {'size': [1, 1], 'counts': '1'}, {'counts': [1]}, [1, 2, 3, 4, 5, 6]),
    *([['a'] * 6], [[1e30] * 6], [None], 'mask', 'circle', [[1, 1], [2, 2]], [[1, 1]]),
)


def places(data, path=()):
    """Keys from the top to every part of JSON data."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def damage(data, draws):
    data = copy.deepcopy(data)
    for _ in range(draws.integers(1, 3)):
        depth = draws.integers(1, 5)
        found = [path for path in places(data) if len(path) == depth]
        if found:
            *above, last = found[draws.integers(len(found))]
            part = data
            for key in above:
                part = part[key]
            if draws.random() < 0.2:
                del part[last]
            else:
                part[last] = copy.deepcopy(JUNK[draws.integers(len(JUNK))])
    return data


@pytest.mark.parametrize('kind', ['coco', 'labelme'])
def test_damaged_annotations_are_converted_or_refused(tmp_path, kind):
    path = write_coco(tmp_path) if kind == 'coco' else write_labelme(tmp_path)
    data, draws = json.loads(path.read_text()), np.random.default_rng(0)
    converted, refusals = 0, []
    for number in range(150):
        write_json(path, damage(data, draws))
        try:
            if kind == 'coco':
                plan = open_coco(str(path), str(tmp_path / 'val2017'), skip_missing=number % 2 == 0)
            else:
                plan = open_labelme(str(tmp_path))
            assert all(sample.draw().dtype == np.uint8 for sample in plan.splits[''])
            assert plan.describe()
            converted += 1
        except ValueError as e:
            refusals.append(str(e))
    assert min(converted, len(refusals)) > 20
    assert [text for text in refusals if not text.startswith('Expected') or len(text) > 1000] == []
