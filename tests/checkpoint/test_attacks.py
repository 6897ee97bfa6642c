"""Files made to run code, to fill the memory or to lie: each is refused at once, and the model left as it was"""

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_checkpoints import tiny, weights

from timm_coretune import load_checkpoint

SECONDS = 5


class Evil:
    """Unpickling this runs a command, and a marker file shows that it did."""

    def __reduce__(self):
        return os.system, ('touch marker',)


def pickled_code(path):
    torch.save({'state_dict': {**weights(), 'evil': Evil()}}, path)


def pickled_code_in_the_old_format(path):
    torch.save({'state_dict': Evil()}, path, _use_new_zipfile_serialization=False)


def pickled_code_alone(path):
    path.write_bytes(pickle.dumps(Evil()))


def pickled_code_named_safetensors(path):
    torch.save({'state_dict': Evil()}, path)


def whole_module(path):
    torch.save(tiny(), path)


def script_module(path):
    torch.jit.save(torch.jit.trace(tiny().eval(), torch.zeros(1, 3, 64, 64)), path)


def zip_bomb(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as f:
        f.writestr('archive/data.pkl', b'\0' * 2**28)
        f.writestr('archive/version', b'3')


def bomb_of_arrays(path):
    np.savez_compressed(path.with_suffix(''), a=np.zeros(2**26))
    os.replace(path.with_suffix('.npz'), path)


def tensor_larger_than_its_file(path):
    torch.save({**weights(), 'conv1.0.weight': torch.zeros(1).expand(2**40)}, path)


def nested_without_end(path):
    node = {'x': torch.zeros(2)}
    for _ in range(60):
        node = {'a': node, 'b': node}
    torch.save(node, path)


def lying(path, change):
    """Safetensors whose header was changed."""
    save_file(weights(), path)
    content = path.read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def header_with_other_shape(path):
    lying(path, lambda header: header['conv1.0.weight'].update(shape=[2**20, 2**20]))


def header_with_offsets_outside(path):
    lying(path, lambda header: header['conv1.0.weight'].update(data_offsets=[0, 2**50]))


def header_with_overlap(path):
    lying(path, lambda header: header['conv1.0.weight'].update(data_offsets=header['bn1.weight']['data_offsets']))


def header_with_unknown_dtype(path):
    lying(path, lambda header: header['conv1.0.weight'].update(dtype='F1'))


def header_longer_than_the_file(path):
    path.write_bytes(struct.pack('<Q', 2**62) + b'{"a": {}}')


def empty(path):
    path.touch()


def web_page(path):
    path.write_text('\n<!DOCTYPE html><html><body>Sign in to continue</body></html>')


def lfs_pointer(path):
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102400\n')


def gzipped(path):
    path.write_bytes(b'\x1f\x8b\x08' + bytes(100))


def noise(path):
    path.write_bytes(random.Random(0).randbytes(5000))


def other_architecture(path):
    torch.save(timm.create_model('test_vit', num_classes=0).state_dict(), path)


def transposed_weight(path):
    state_dict = weights()
    name = next(k for k, v in state_dict.items() if v.ndim == 4 and v.shape[0] != v.shape[1])
    torch.save({**state_dict, name: state_dict[name].transpose(0, 1).contiguous()}, path)


def integers(path):
    torch.save({k: v.to(torch.int8) for k, v in weights().items()}, path)


def not_a_number(path):
    state_dict = weights()
    state_dict['layer1.0.conv1.weight'][0] = float('nan')
    torch.save(state_dict, path)


def infinite(path):
    state_dict = weights()
    state_dict['layer1.0.conv1.weight'][0, 0, 0, 0] = float('-inf')
    save_file(state_dict, path)


ATTACKS = (
    (pickled_code, r'wants to import (posix|nt|os)\.system'),
    (pickled_code_in_the_old_format, r'wants to import (posix|nt|os)\.system'),
    (pickled_code_alone, 'could not read|wants to import'),
    (pickled_code_named_safetensors, 'the name of another format'),
    (whole_module, 'wants to import .*ResNet'),
    (script_module, 'TorchScript archive, a program'),
    (zip_bomb, 'unpacks to 268435'),
    (bomb_of_arrays, 'unpacks to 536'),
    (tensor_larger_than_its_file, r'conv1.0.weight of shape \(1099511627776,\)'),
    (nested_without_end, 'found only'),
    (header_with_other_shape, 'damaged safetensors'),
    (header_with_offsets_outside, 'damaged safetensors'),
    (header_with_overlap, 'damaged safetensors'),
    (header_with_unknown_dtype, 'damaged safetensors'),
    (header_longer_than_the_file, 'header of 4611686018427387904 bytes'),
    (empty, 'an empty file'),
    (web_page, 'a web page'),
    (lfs_pointer, 'a git-lfs pointer.*git lfs pull'),
    (gzipped, 'a gzip archive'),
    (noise, 'an unknown format'),
    (other_architecture, 'are missing .* It fits test_vit'),
    (transposed_weight, '1 are missing .*have another shape'),
    (integers, 'holds torch.int8'),
    (not_a_number, 'NaN or infinity in layer1.0.conv1.weight'),
    (infinite, 'NaN or infinity in layer1.0.conv1.weight'),
)


def refused_in_time(path, message, folder):
    model = tiny(num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = dict(model.pretrained_cfg)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, str(path))
    assert time.perf_counter() - start < SECONDS
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.pretrained_cfg == config
    assert not (folder / 'marker').exists()


@pytest.mark.parametrize('make, message', ATTACKS, ids=[make.__name__ for make, _ in ATTACKS])
def test_a_hostile_or_broken_file_is_refused_and_the_model_left_alone(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ('checkpoint.safetensors' if 'safetensors' in make.__name__ else 'checkpoint.pth')
    make(path)
    refused_in_time(path, message, tmp_path)


@pytest.mark.parametrize('form', ['safetensors', 'torch', 'torch-legacy'])
def test_a_file_that_is_cut_anywhere_is_refused(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'whole'
    if form == 'safetensors':
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=form == 'torch')
    content = path.read_bytes()
    draw = random.Random(0)
    for cut in (draw.randrange(1, len(content)) for _ in range(10)):
        (tmp_path / 'cut').write_bytes(content[:cut])
        refused_in_time(tmp_path / 'cut', 'could not read|wants to import', tmp_path)


@pytest.mark.parametrize(
    'make', [pickled_code, pickled_code_in_the_old_format, pickled_code_alone], ids=lambda make: make.__name__
)
def test_the_marker_of_these_files_would_appear_if_they_were_unpickled(make, tmp_path):
    make(tmp_path / 'evil.pth')
    read = (
        'pickle.load(open("evil.pth", "rb"))'
        if make is pickled_code_alone
        else ('torch.load("evil.pth", weights_only=False)')
    )
    subprocess.run([sys.executable, '-c', f'import pickle, torch; {read}'], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / 'marker').exists()


def shards(folder, names=('model-1.safetensors', 'model-2.safetensors')):
    """A state dict in two files, and the index that names them."""
    folder.mkdir()
    items = sorted(weights().items())
    parts = dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])
    for part, file in zip(parts, ('model-1.safetensors', 'model-2.safetensors'), strict=True):
        save_file(part, folder / file)
    index = {'weight_map': {key: name for part, name in zip(parts, names, strict=True) for key in part}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return folder


def test_a_folder_of_shards_is_loaded_whole(tmp_path):
    assert load_checkpoint(tiny(), str(shards(tmp_path / 'model'))).missing == ()


@pytest.mark.parametrize('name', ['../../etc/passwd', '/etc/passwd', '..', '', 'sub/model-2.safetensors', 7])
def test_an_index_that_leads_out_of_its_folder_is_refused(name, tmp_path):
    folder = shards(tmp_path / 'model', ('model-1.safetensors', name))
    refused_in_time(folder, 'inside|weight_map', tmp_path)


def test_a_shard_that_links_out_of_its_folder_is_refused(tmp_path):
    folder = shards(tmp_path / 'model')
    os.replace(folder / 'model-2.safetensors', tmp_path / 'elsewhere.safetensors')
    os.symlink(tmp_path / 'elsewhere.safetensors', folder / 'model-2.safetensors')
    refused_in_time(folder, 'outside of it', tmp_path)


def test_the_links_of_the_cache_of_the_hub_are_followed(tmp_path):
    repository = tmp_path / 'models--owner--name'
    (repository / 'snapshots').mkdir(parents=True)
    (repository / 'blobs').mkdir()
    folder = shards(repository / 'snapshots' / '1234')
    for file in ('model-1.safetensors', 'model-2.safetensors'):
        os.replace(folder / file, repository / 'blobs' / file)
        os.symlink(f'../../blobs/{file}', folder / file)
    assert load_checkpoint(tiny(), str(folder)).missing == ()


@pytest.mark.parametrize('text', ['', '[]', '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "b"}}'])
def test_a_broken_index_is_refused(text, tmp_path):
    folder = shards(tmp_path / 'model')
    (folder / 'model.safetensors.index.json').write_text(text)
    refused_in_time(folder, 'index', tmp_path)


def test_harmless_data_beside_the_weights_is_read(tmp_path):
    import argparse
    from pathlib import Path

    extra = {
        'args': argparse.Namespace(data=Path('images'), lr=0.1),
        'accuracy': np.float64(71.1),
        'history': np.arange(3.0),
        'epoch': np.int64(3),
    }
    torch.save({'state_dict': weights(), **extra}, tmp_path / 'checkpoint.pth')
    assert load_checkpoint(tiny(), str(tmp_path / 'checkpoint.pth')).container == 'state_dict'
