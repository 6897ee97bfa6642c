"""A safetensors file of images as folders of classes"""

import json
from collections import Counter

import make_fashion
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

NAMES = ['T-shirt/top', 'Bag']


@pytest.fixture
def sample(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, count in (('train', 20), ('validation', 6)):
        tensors[f'{split}.image'] = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        tensors[f'{split}.label'] = torch.arange(count) // (count // 2)
    save_file(tensors, tmp_path / 'sample.safetensors', metadata={'class_names': json.dumps(NAMES)})
    return tmp_path / 'sample.safetensors', tensors


def test_val_is_a_share_of_train_and_test_is_the_validation_split(sample, run_script, tmp_path):
    file, tensors = sample
    run_script(make_fashion, '--input', file, '--output', tmp_path / 'out')
    shown = {'train': [], 'val': [], 'test': []}
    counts = Counter()
    for path in sorted((tmp_path / 'out').rglob('*.png')):
        split, group, _ = path.relative_to(tmp_path / 'out').parts
        shown[split].append((('T-shirt-top', 'Bag').index(group), np.asarray(Image.open(path)).tobytes()))
        counts[split, group] += 1
    expected = {'train': 8, 'val': 2, 'test': 3}
    assert counts == {(split, group): expected[split] for split in expected for group in ('T-shirt-top', 'Bag')}
    for split, parts in (('train', shown['train'] + shown['val']), ('validation', shown['test'])):
        pairs = zip(tensors[f'{split}.label'].tolist(), tensors[f'{split}.image'].numpy(), strict=True)
        assert sorted(parts) == sorted((label, image.tobytes()) for label, image in pairs)


def test_the_seed_says_what_is_held_out(sample, run_script, bytes_of, tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        run_script(make_fashion, '--input', sample[0], '--seed', seed, '--output', tmp_path / name)
    assert bytes_of(tmp_path / 'a') == bytes_of(tmp_path / 'b')
    assert bytes_of(tmp_path / 'a').keys() != bytes_of(tmp_path / 'c').keys()


def test_a_share_of_nothing_or_a_file_of_something_else_is_an_error(sample, run_script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script(make_fashion, '--input', sample[0], '--val-fraction', 1, '--output', tmp_path / 'out')
    assert 'Expected --val-fraction between 0 and 1, got 1.0' in capsys.readouterr().err
    with pytest.raises(ValueError, match='could not read'):
        run_script(make_fashion, '--input', tmp_path / 'none', '--output', tmp_path / 'out')
