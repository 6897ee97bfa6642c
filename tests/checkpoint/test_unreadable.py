"""What is no checkpoint, or beyond all limits: one sentence that names the file, at once, and the model untouched"""

import json
import os
import socket
import time
import zipfile

import numpy as np
import pytest
import timm
import torch
from damaged_checkpoints import weights as weights_with_classifier
from safetensors.torch import save_file
from timm.models import load_checkpoint as timm_load_checkpoint
from tiny_checkpoints import tiny, weights

from timm_coretune import load_checkpoint
from timm_coretune.checkpoint import convert_checkpoint
from timm_coretune.checkpoint.load import _check_shapes
from timm_coretune.checkpoint.reading import tree
from timm_coretune.checks import clip, shorten
from timm_coretune.run_folder import BEST_STATE_NAME, LAST_STATE_NAME


def refused(path, match, model=None, **options):
    model = tiny(num_classes=3) if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = dict(model.pretrained_cfg)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint(model, path, **options)
    assert time.perf_counter() - start < 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.pretrained_cfg == config
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 2500
    return text


def pipe(path):
    os.mkfifo(path)


def plug(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def device(path):
    path.symlink_to('/dev/zero')


def link_to_nothing(path):
    path.symlink_to('nothing')


def link_to_itself(path):
    path.symlink_to(path.name)


def folder(path):
    path.mkdir()


NO_FILES = {
    pipe: 'a named pipe',
    plug: 'a socket',
    device: 'a device',
    link_to_nothing: "a link to '[^']*nothing', which is not there",
    link_to_itself: 'a link to',
    folder: 'a folder',
}


@pytest.mark.parametrize('make', NO_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize('place', ['file', 'in folder', 'config', 'shard', 'index'])
def test_what_is_no_file_is_not_opened(place, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if place == 'file':
        path = source = tmp_path / 'checkpoint.pth'
        if make is folder:
            pytest.skip('a folder may be a checkpoint')
    else:
        source = tmp_path / 'model'
        source.mkdir()
        name = {'in folder': 'model.safetensors', 'config': 'config.json', 'shard': 'b.safetensors'}.get(
            place, 'model.safetensors.index.json'
        )
        path = source / name
    if place == 'config':
        save_file(weights(), source / 'model.safetensors')
    if place == 'shard':
        save_file(weights(), source / 'a.safetensors')
        index = {'weight_map': {'x': 'a.safetensors', 'y': 'b.safetensors'}}
        (source / 'model.safetensors.index.json').write_text(json.dumps(index))
    make(path)
    match = 'outside of it|is missing' if place == 'shard' else NO_FILES[make]
    refused(source, f'{path.name}.*({match})')


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read every file')
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    torch.save(weights(), tmp_path / 'a.pth')
    (tmp_path / 'a.pth').chmod(0)
    refused(tmp_path / 'a.pth', r'a\.pth.*Permission denied')


KEYS = {
    '60,000 dots': lambda state: {**state, 'a' + '.b' * 60_000: torch.zeros(1)},
    '29,000 letters': lambda state: {**state, 'k' * 29_000: torch.zeros(1)},
    '3,000 levels': lambda state: {'a.' * 3_000 + key: value for key, value in state.items()},
}


@pytest.mark.parametrize('form', ['torch', 'safetensors'])
@pytest.mark.parametrize('name', KEYS)
def test_a_key_longer_than_any_is_refused_in_a_short_sentence(name, form, tmp_path):
    (torch.save if form == 'torch' else save_file)(KEYS[name](weights()), tmp_path / 'a')
    assert len(refused(tmp_path / 'a', 'a key of .* characters with .* dots')) < 500


def test_keys_in_messages_are_cut_and_in_one_line(tmp_path):
    state = {f'{name}\n\x1b[31m{"x" * 700}': value for name, value in weights().items()}
    torch.save(state, tmp_path / 'a.pth')
    refused(tmp_path / 'a.pth', 'are missing')
    assert shorten(['a' * 10_000, 'b\nc']) == f'{"a" * 75} ... {"a" * 75}, b c'
    assert clip('\ud800\x00é') == '??é'


def test_more_tensors_than_any_file_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, 'MAX_TENSORS', 50)
    for form, save in (('a.pth', torch.save), ('a.safetensors', save_file)):
        save(weights(), tmp_path / form)
        refused(tmp_path / form, 'more than 50 tensors')


@pytest.mark.parametrize('fits', [True, False])
def test_many_tensors_take_no_longer_than_three_times_as_in_timm(fits, tmp_path):
    path = str(tmp_path / 'a.safetensors')
    name = 'b{}.x{}' if fits else 'blocks.{}.attn{}'
    save_file({**weights(), **{name.format(i % 900, i): torch.zeros(1) for i in range(5_000)}}, path)
    model = tiny()
    seconds = []
    for load in (lambda: timm_load_checkpoint(model, path, strict=False), lambda: load_checkpoint(model, path)):
        start = time.process_time()
        try:
            load()
        except ValueError:
            assert not fits
        seconds.append(time.process_time() - start)
    assert seconds[1] < 3 * seconds[0] + 2  # building models for the error takes the same for any file


def test_shapes_are_checked_before_the_first_copy():
    state = {'a': torch.zeros(2, 3), 'b': torch.zeros(3)}
    _check_shapes(state, {'a': torch.ones(2, 3), 'b': torch.ones(3)}, 'x.pth')
    with pytest.raises(ValueError, match=r"'x.pth'.*b \(1,\) for \(3,\)"):
        _check_shapes(state, {'a': torch.ones(2, 3), 'b': torch.ones(1)}, 'x.pth')


def npz_with_header(path, header):
    arrays = {'cls': np.zeros((1, 1, 64), np.float32)}
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, 'w') as archive:
        text = header.encode() + b'\n'
        archive.writestr('cls.npy', b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text + bytes(256))


@pytest.mark.parametrize('header', [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': 'f4,f4', 'fortran_order': False, 'shape': (2,), }",
    '(' * 3000, '', '9' * 9000, "{'descr': '<f4'}", '__import__("os").system("touch marker")',
], ids=range(8))  # fmt: skip
def test_a_header_of_an_npz_archive_that_lies_is_refused(header, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz_with_header(tmp_path / 'a.npz', header)
    refused(tmp_path / 'a.npz', r'a\.npz', timm.create_model('test_vit', num_classes=0))
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('mean, std', [
    ([0.5, 0.5, float('nan')], [0.2] * 3), ([0.5] * 3, [0.0] * 3), ([0.5] * 3, [-0.2] * 3), ([1e30] * 3, [0.2] * 3),
    (['a', 'b', 'c'], [0.2] * 3), ([0.5] * 3, [0.2]), ({}, {}), ([0.5, 0.5, float('inf')], [0.2] * 3),
    ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4]),
], ids=str)  # fmt: skip
@pytest.mark.parametrize('place', ['preprocessor_config.json', 'config.json', 'open_clip_config.json', 'metadata'])
def test_a_mean_or_std_that_cannot_be_is_refused(place, mean, std, tmp_path):
    metadata = {}
    if place == 'preprocessor_config.json':
        content = {'image_mean': mean, 'image_std': std}
    elif place == 'config.json':
        content = {'architecture': 'test_resnet', 'pretrained_cfg': {'mean': mean, 'std': std}}
    else:
        content = {'preprocess_cfg': {'mean': mean, 'std': std}}
    if place == 'metadata':
        metadata = {'mean': ' '.join(map(str, mean)), 'std': ' '.join(map(str, std))}
    else:
        (tmp_path / place).write_text(json.dumps(content))
    save_file(weights(), tmp_path / 'model.safetensors', metadata)
    assert str(tmp_path) in refused(tmp_path, 'Expected mean and std as one number for each channel')


@pytest.mark.parametrize('config, match', [
    ([], None), ('text', None), (None, None),
    ({'architecture': 7}, 'architecture as text'),
    ({'architecture': 'test_resnet', 'model_args': {'checkpoint_path': '/etc/passwd'}}, 'load weights from elsewhere'),
    ({'architecture': 'test_resnet', 'model_args': {'pretrained': True}}, 'load weights from elsewhere'),
    ({'architecture': 'test_vit', 'model_args': {'depth': 10**6}}, 'at most 256 layers'),
    ({'architecture': 'test_vit', 'model_args': {'embed_dim': 10**400}}, 'numbers, names and lists of these'),
    ({'architecture': 'hf-hub:me/model', 'model_args': {'pretrained': True}}, None),
    ({'architecture': 'test_resnet', 'model_args': [1]}, 'arguments by name as model_args'),
    ({'architecture': 'test_resnet', 'pretrained_cfg': 'x'}, 'description of a model'),
    ({'architecture': 'test_resnet', 'pretrained_cfg': {'input_size': [3, 0, 2**40]}}, 'input_size'),
    ({'architecture': 'test_resnet', 'pretrained_cfg': {'crop_pct': 'x'}}, 'crop_pct'),
    ({'architecture': 'test_resnet', 'pretrained_cfg': {'interpolation': [1]}}, 'interpolation'),
    ({'architecture': 'test_resnet', 'pretrained_cfg': {'mean': [10**400], 'std': [1]}}, 'mean and std'),
    ({'backbone': {'architecture': 'test_resnet'}}, 'description of a model'),
    ({'backbone': {'architecture': 'test_resnet'}, 'img_size': [8, 8], 'head': [1]}, 'head as text'),
    ({'model_type': 'resnet', 'layer_norm_eps': 10**400, 'hidden_act': 'relu'}, None),
], ids=range(18))  # fmt: skip
def test_a_config_with_values_of_a_wrong_kind_is_refused_or_of_no_use(config, match, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    save_file(weights(), tmp_path / 'model.safetensors')
    if match is None:
        assert load_checkpoint(tiny(), tmp_path).missing == ()
    else:
        assert refused(tmp_path, match, load_classifier=True).count(str(tmp_path)) == 1


@pytest.mark.parametrize('vision', [{'layers': 2, 'head_width': 0}, {'layers': 2, 'norm_kwargs': [1]}], ids=str)
def test_a_config_of_open_clip_with_values_of_a_wrong_kind_is_refused(vision, tmp_path):
    content = {'model_cfg': {'vision_cfg': vision}}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(content))
    save_file(weights(), tmp_path / 'model.safetensors')
    refused(tmp_path, 'Expected configs that describe a network .*open_clip_config.json')


@pytest.mark.parametrize('text', [b'{' * 100_000, b'\xff\xfe', b'', b'[' * 100_000], ids=range(4))
def test_a_config_that_is_no_json_is_refused(text, tmp_path):
    (tmp_path / 'config.json').write_bytes(text)
    save_file(weights(), tmp_path / 'model.safetensors')
    refused(tmp_path, r'Expected JSON in .*config\.json')


@pytest.mark.parametrize('names', [(BEST_STATE_NAME, LAST_STATE_NAME), (LAST_STATE_NAME,)], ids=str)
def test_the_folder_of_a_run_that_was_cut_off_is_loaded(names, tmp_path):
    for number, name in enumerate((*names, 'checkpoint-0.pth.tar')):
        torch.save({'state_dict': weights(seed=number), 'epoch': number, 'arch': 'test_resnet'}, tmp_path / name)
    (tmp_path / 'args.yaml').write_text('model: test_resnet\n')
    model = tiny()
    assert load_checkpoint(model, tmp_path).missing == ()
    assert torch.equal(model.conv1[0].weight, weights(seed=0)['conv1.0.weight'])


def test_the_best_weights_of_a_run_come_before_its_states(tmp_path):
    torch.save({'state_dict': weights(seed=1)}, tmp_path / LAST_STATE_NAME)
    save_file(weights_with_classifier(), tmp_path / 'model_best.safetensors')
    model = tiny(num_classes=3)
    report = load_checkpoint(model, tmp_path, load_classifier=True)
    assert report.classifier
    assert torch.equal(model.fc.weight, weights_with_classifier()['fc.weight'])


@pytest.mark.skipif(os.name != 'posix', reason='modes of files are those of POSIX')
@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_converted_checkpoint_has_the_mode_of_a_new_file(umask, mode, tmp_path):
    torch.save(weights(), tmp_path / 'a.pth')
    previous = os.umask(umask)
    try:
        convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'b.safetensors', tiny())
    finally:
        os.umask(previous)
    assert os.stat(tmp_path / 'b.safetensors').st_mode & 0o777 == mode


def test_a_patch_projection_larger_than_any_is_not_resampled(tmp_path):
    model = timm.create_model('test_vit', num_classes=3)
    state = {**model.state_dict(), 'patch_embed.proj.weight': torch.zeros(64, 3, 100, 100)}
    torch.save(state, tmp_path / 'a.pth')
    refused(tmp_path / 'a.pth', r'patch_embed.proj.weight \(64, 3, 100, 100\) for \(64, 3, 16, 16\)', model)
