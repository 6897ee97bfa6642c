"""A safetensors file is opened once, each of its tensors is checked once and copied once, and nothing else is read."""

import json
import math
from unittest import mock

import pytest
import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from timm_coretune import load_checkpoint
from timm_coretune.checkpoint import load
from timm_coretune.checkpoint.plan import total
from timm_coretune.checkpoint.read import read_files
from timm_coretune.checkpoint.reading import safetensors_files
from timm_coretune.checkpoint.reading.safetensors_files import Pages, read_safetensors

LARGE = 2**16 + 1  # elements of a tensor that is read in two halves, with one left over


class Sums(TorchDispatchMode):
    """Counts the bytes that sums and products of large tensors read."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.sum, torch.ops.aten.dot):
            self.bytes += sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_each_tensor_is_checked_once_and_copied_once(tmp_path, monkeypatch):
    path = tmp_path / 'model.safetensors'
    weights = timm.create_model('resnet18', num_classes=3).state_dict()
    save_file(weights, path)
    opened, copied = [], []

    class Counted:
        def __init__(self, path, framework):
            opened.append(path)
            self.inner = safetensors.safe_open(path, framework)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *args):
            return self.inner.__exit__(*args)

    fill = load._fill
    monkeypatch.setattr(safetensors_files, 'safe_open', Counted)
    monkeypatch.setattr(load, '_fill', lambda to, of: (copied.append(of.nbytes), fill(to, of)))
    with Sums() as sums:
        load_checkpoint(timm.create_model('resnet18', num_classes=3), path, load_classifier=True)

    length = int.from_bytes(path.read_bytes()[:8], 'little')
    data = path.stat().st_size - 8 - length
    counters = sum(tensor.nbytes for tensor in weights.values() if not tensor.is_floating_point())
    assert opened == [str(path)]
    assert len(copied) == len(weights)
    assert sum(copied) == data
    assert sums.bytes == data - counters


def shifted(path):
    """A file whose float32 tensor begins at an odd byte, which the library writes in another order."""
    values = torch.arange(3, dtype=torch.float32)
    header = {
        'a': {'dtype': 'U8', 'shape': [1], 'data_offsets': [0, 1]},
        'b': {'dtype': 'F32', 'shape': [3], 'data_offsets': [1, 13]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + b'\7' + values.numpy().tobytes())


def can_write_complex(path):
    """Whether the library can, as older ones cannot."""
    try:
        save_file({'a': torch.zeros(1, dtype=torch.complex64)}, path)
    except KeyError:
        return False
    return True


def test_tensors_equal_those_of_the_library(tmp_path):
    dtypes = [*safetensors_files._DTYPES.values(), torch.float8_e4m3fn]
    if can_write_complex(tmp_path / 'complex.safetensors'):
        dtypes.append(torch.complex64)
    written = {str(dtype): torch.arange(-3, 3).reshape(2, 3).to(dtype) for dtype in dtypes}
    written |= {'empty': torch.empty(0, 4), 'scalar': torch.tensor(2.5)}
    save_file(written, tmp_path / 'all.safetensors', {'format': 'pt'})
    shifted(tmp_path / 'shifted.safetensors')
    for name in ('all', 'shifted'):
        path = str(tmp_path / f'{name}.safetensors')
        read, expected = read_safetensors(path), load_file(path)
        assert read.tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            assert (read.tensors[key].dtype, read.tensors[key].shape) == (tensor.dtype, tensor.shape)
            raw, reference = (t.contiguous().view(-1).view(torch.uint8) for t in (read.tensors[key], tensor))
            assert torch.equal(raw, reference), key
        assert read.metadata == ({'format': 'pt'} if name == 'all' else {})


def test_memory_that_is_given_back_is_read_again_unless_a_filter_wrote_into_it(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_coretune.checkpoint.read.BATCH_BYTES', 1000)
    given_back = mock.Mock(wraps=Pages.give_back)
    monkeypatch.setattr(Pages, 'give_back', lambda pages: given_back(pages))
    path = tmp_path / 'file.safetensors'
    weight = torch.randn(100, 1000)
    save_file({'weight': weight, 'token': torch.ones(4)}, path)
    checkpoint = read_files('file', (str(path),), {})
    for _ in range(2):
        batches = list(checkpoint.batches(checkpoint.tree))
        assert any(torch.equal(batch['weight'], weight) for batch in batches if 'weight' in batch)
    assert given_back.call_count == 4
    checkpoint.tree['token'] += 1  # as timm's filter of NaFlexViT does
    for _ in range(2):
        batches = list(checkpoint.batches(checkpoint.tree))
        assert any(batch['token'].tolist() == [2, 2, 2, 2] for batch in batches if 'token' in batch)
    assert given_back.call_count == 4
    assert load_file(path)['token'].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('place', [0, LARGE // 2 - 1, LARGE // 2, LARGE - 2, LARGE - 1])
@pytest.mark.parametrize('others', [0.0, 1.0])
def test_the_total_of_a_large_tensor_is_not_finite_if_one_value_is_not(value, place, others):
    tensor = torch.full((LARGE,), others)
    assert math.isfinite(total(tensor))
    tensor[place] = value
    assert not math.isfinite(total(tensor))


def test_large_values_whose_total_overflows_are_loaded_and_an_infinite_one_is_not(tmp_path):
    model = timm.create_model('resnet18', num_classes=0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights['layer4.0.conv2.weight'].fill_(3e38)
    save_file(weights, tmp_path / 'large.safetensors')
    load_checkpoint(model, tmp_path / 'large.safetensors')
    assert (model.layer4[0].conv2.weight == 3e38).all()
    weights['layer4.0.conv2.weight'].view(-1)[-1] = math.inf
    save_file(weights, tmp_path / 'infinite.safetensors')
    model = timm.create_model('resnet18', num_classes=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match='found NaN or infinity in layer4.0.conv2.weight'):
        load_checkpoint(model, tmp_path / 'infinite.safetensors')
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('dtypes', [('float32', 'float32'), ('bfloat16', 'bfloat16'), ('float32', 'float16')])
@pytest.mark.parametrize('layout', ['contiguous', 'permuted file', 'permuted model'])
def test_a_tensor_is_filled_as_torch_copies_it(threads, dtypes, layout, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    tensor, source = (torch.randn(64, 32, 8, 8).to(getattr(torch, dtype)) for dtype in dtypes)
    if layout == 'permuted file':
        source = source.permute(0, 1, 3, 2)
    if layout == 'permuted model':
        tensor = tensor.to(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(tensor)
    with torch.no_grad():
        load._fill(parameter, source)
    assert torch.equal(parameter, source.to(parameter.dtype))
    assert parameter.stride() == tensor.stride()
