"""Checkpoints that would load without a word and compute something else: videos, other patches, other configs"""

import functools
import json
import logging

import huggingface_hub
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from hub_server import HubServer, Repository, connect_client
from safetensors.torch import save
from tiny_checkpoints import tiny, weights

from timm_coretune import convert_checkpoint, export_model, inspect_checkpoint, load_checkpoint
from timm_coretune.checkpoint.__main__ import run
from timm_coretune.checkpoint.source import split_hub_id
from timm_coretune.hub.push import _base_model


def vit(**kwargs):
    kwargs = {'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'img_size': 32, **kwargs}
    return timm.create_model('vit_tiny_patch16_224', num_classes=0, **kwargs).eval()


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor + 0.05 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def picture(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def save_torch(tmp_path):
    def write(content):
        torch.save(content, tmp_path / 'checkpoint.pth')
        return tmp_path / 'checkpoint.pth'

    return write


# videos


def video(frames, tubelet=1):
    """Weights of a ViT of 2 x 2 patches of 16 px, for videos of so many frames, of which tubelet make a token."""
    state = dict(randomized(vit()).state_dict())
    generator = torch.Generator().manual_seed(2)
    state['patch_embed.proj.weight'] = torch.randn(48, 3, tubelet, 16, 16, generator=generator)
    state['pos_embed'] = torch.randn(1, 1 + frames // tubelet * 4, 48, generator=generator)
    return state


@pytest.mark.parametrize('frames, tubelet', [(4, 1), (4, 2), (3, 1)], ids=['square', 'tubelets', 'no-square'])
def test_a_network_of_video_is_refused(frames, tubelet, save_torch):
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'Expected a network of pictures, got one of video.*--checkpoint-frames N'):
        load_checkpoint(model, save_torch(video(frames, tubelet)), allow_partial=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('frames, tubelet', [(4, 1), (4, 2), (6, 2)])
def test_frames_are_averaged_on_request(frames, tubelet, save_torch):
    state, model = video(frames, tubelet), vit()
    report = load_checkpoint(model, save_torch({'encoder': state}), frames=frames)
    assert 'input_size' not in report.data_config or report.data_config['input_size'] == (3, 32, 32)
    # what the network of video computes of a picture that stands still
    still = picture(32)[:, :, None].expand(-1, -1, frames, -1, -1)
    weight, bias = state['patch_embed.proj.weight'], state['patch_embed.proj.bias']
    tokens = F.conv3d(still, weight, bias, stride=(tubelet, 16, 16)).flatten(3).transpose(1, 3)
    with torch.no_grad():
        assert (model.patch_embed(picture(32)) - tokens[:, :, 0]).abs().max() < 1e-3
    steps = frames // tubelet
    for patch in range(4):
        expected = sum(state['pos_embed'][0, 1 + step * 4 + patch] for step in range(steps)) / steps
        assert torch.allclose(model.pos_embed[0, 1 + patch], expected, atol=1e-6)
    assert torch.equal(model.pos_embed[0, 0], state['pos_embed'][0, 0])


def test_a_network_of_video_with_one_frame_is_one_of_pictures(save_torch):
    state = video(1)
    model = vit()
    load_checkpoint(model, save_torch(state))
    assert torch.equal(model.patch_embed.proj.weight, state['patch_embed.proj.weight'][:, :, 0])
    larger = vit(img_size=64)
    with pytest.raises(ValueError, match='got one of video'):
        load_checkpoint(larger, save_torch(state))  # 4 patches of one frame, or 1 patch of 4
    load_checkpoint(larger, save_torch(state), frames=1)


def test_a_config_that_names_frames_decides(tmp_path):
    torch.save(video(4), tmp_path / 'model.pth')
    (tmp_path / 'config.json').write_text(json.dumps({'pretrained_cfg': {'num_frames': 4}}))
    with pytest.raises(ValueError, match='its 17 position embeddings are of 4 frames'):
        load_checkpoint(vit(img_size=64), tmp_path)


@pytest.mark.parametrize(
    'state, frames, message',
    [
        (video(4), 3, 'Expected position embeddings of 3 frames in pos_embed, it has 17'),
        (video(4, 2), 3, 'Expected frames as a multiple of the 2'),
        (dict(vit().state_dict()), 2, 'found no patch projection with a time axis'),
    ],
    ids=['wrong-number', 'no-multiple', 'no-video'],
)
def test_a_wrong_number_of_frames_is_told(state, frames, message, save_torch):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(vit(), save_torch(state), frames=frames)


# patches of another size


@pytest.mark.parametrize(
    'patch, size, grid', [(8, 64, 8), (8, 128, 16), (14, 112, 8), (32, 128, 4)], ids=['8', '8-large', '14', '32']
)
def test_the_size_of_patches_comes_from_the_file(patch, size, grid, save_torch, caplog):
    file = save_torch(vit(patch_size=16, img_size=128).state_dict())
    model = vit(patch_size=patch, img_size=size)
    built = model.pretrained_cfg['input_size']
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, file)
    assert report.data_config['input_size'] == (3, 128, 128)
    (note,) = [note for note in report.notes if 'patches of' in note]
    assert f'pretrained with patches of 16 px, the model has patches of {patch} px: the patch projection is' in note
    assert (f'are resized from 8 x 8 to {grid} x {grid}' in note) == (grid != 8)
    assert ('position embeddings are resized' in caplog.text) == (grid != 8)
    assert model.pretrained_cfg['input_size'] == ((3, 128, 128) if size == 128 else built)


def test_the_same_patches_need_no_note(save_torch):
    report = load_checkpoint(vit(), save_torch(vit().state_dict()))
    assert not [note for note in report.notes if 'patches' in note or 'px' in note]


def test_the_model_with_the_patches_of_the_file_is_found(save_torch):
    state = timm.create_model('vit_small_patch8_224', num_classes=0, weight_init='skip').state_dict()
    file = save_torch({key: torch.zeros_like(value) for key, value in state.items()})
    assert inspect_checkpoint(file).architecture.startswith('vit_small_patch8_224')


# repositories with several files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = HubServer()
    connect_client(server, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(huggingface_hub.hf_api.api, 'endpoint', server.url)
    yield server
    server.end()


def put_on(hub, **files):
    repository = hub.repositories['owner/name'] = Repository()
    repository.files().update({name.replace('__', '/'): content for name, content in files.items()})
    return repository


def other_weights():
    return {key: value + 1 for key, value in weights().items()}


def test_a_file_of_a_repository_can_be_named_and_must_be_among_several(hub):
    files = {'a.safetensors': save(other_weights()), 'b.safetensors': save(weights())}
    put_on(hub, **files, **{'deep__c.safetensors': save(other_weights()), 'README.md': b'none'})
    with pytest.raises(ValueError, match=r'found a.safetensors, b.safetensors. Name the file.*owner/name/FILE'):
        load_checkpoint(tiny(), 'hf-hub:owner/name')
    for name, expected in (('b.safetensors', weights()), ('deep/c.safetensors', other_weights())):
        for revision in ('', '@main'):
            model = tiny()
            load_checkpoint(model, f'hf-hub:owner/name/{name}{revision}')
            assert torch.equal(model.conv1[0].weight, expected['conv1.0.weight'])
    with pytest.raises(ValueError, match='found a.safetensors, b.safetensors'):  # also once the cache has some
        load_checkpoint(tiny(), 'hf-hub:owner/name')
    with pytest.raises(ValueError, match=r"Expected the file 'z.pth' .*a.safetensors, b.safetensors, deep/c"):
        load_checkpoint(tiny(), 'hf-hub:owner/name/z.pth')


def test_one_file_of_any_name_and_the_usual_names_need_no_name(hub):
    put_on(hub, **{'weights.safetensors': save(weights()), 'deep__c.safetensors': save(other_weights())})
    assert load_checkpoint(tiny(), 'hf-hub:owner/name').missing == ()
    put_on(hub, **{'model.safetensors': save(weights()), 'other.pth': b''})
    assert load_checkpoint(tiny(), 'hf-hub:owner/name').missing == ()


def test_files_below_the_top_are_listed(hub):
    put_on(hub, **{'one__model.safetensors': save(weights())})
    with pytest.raises(ValueError, match='found one/model.safetensors below it'):
        load_checkpoint(tiny(), 'hf-hub:owner/name')


# configs


def transformers_vit(**config):
    transformers = pytest.importorskip('transformers', reason="needs the 'test-formats' extra")
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192)
    return randomized(transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, **config)))


def test_the_default_vit_of_transformers_has_another_epsilon(tmp_path, caplog):
    module = transformers_vit()
    module.save_pretrained(tmp_path)
    message = r'trained with layer_norm_eps 1e-12, this model has 1e-06.*eps=1e-12.*--allow-differences'
    with pytest.raises(ValueError, match=message):
        load_checkpoint(vit(), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(vit(), tmp_path, allow_differences=True).matched
    assert 'layer_norm_eps' in caplog.text
    exact = vit(norm_layer=functools.partial(nn.LayerNorm, eps=1e-12))
    load_checkpoint(exact, tmp_path)
    with torch.no_grad():
        expected = module(picture(32)).last_hidden_state
        assert (exact.forward_features(picture(32)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize('name, timm_name', [('relu', 'relu'), ('gelu_new', 'gelu_tanh'), ('silu', 'silu')])
def test_another_activation_is_refused_and_the_fix_computes_the_same(name, timm_name, tmp_path):
    module = transformers_vit(hidden_act=name, layer_norm_eps=1e-6)
    module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"activation '{name}' .hidden_act., this model has GELU.*{timm_name}"):
        load_checkpoint(vit(), tmp_path)
    model = vit(act_layer=timm_name)
    load_checkpoint(model, tmp_path)
    with torch.no_grad():
        expected = module(picture(32)).last_hidden_state
        assert (model.forward_features(picture(32)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize('key', ['downsample_in_bottleneck', 'downsample_in_first_stage'])
def test_a_resnet_that_halves_elsewhere_is_refused(key, tmp_path):
    transformers = pytest.importorskip('transformers', reason="needs the 'test-formats' extra")
    config = dict(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3])
    module = randomized(transformers.ResNetModel(transformers.ResNetConfig(**config, **{key: True})))
    module.save_pretrained(tmp_path)
    model = timm.create_model('resnet50', num_classes=0)
    with pytest.raises(ValueError, match=f'trained with {key} True'):
        load_checkpoint(model, tmp_path)
    load_checkpoint(model, tmp_path, allow_differences=True)
    with torch.no_grad():
        ours = model.eval().forward_features(picture(64))
        theirs = module(picture(64)).last_hidden_state
    assert ours.shape != theirs.shape or (ours - theirs).abs().max() > 1e-3  # it is another network


def test_inspection_notes_a_difference_and_conversion_asks_for_leave(tmp_path, capsys):
    transformers_vit().save_pretrained(tmp_path / 'hf')
    source, destination = str(tmp_path / 'hf'), str(tmp_path / 'out.safetensors')
    assert any('layer_norm_eps' in note for note in inspect_checkpoint(source, vit()).notes)
    with pytest.raises(ValueError, match='layer_norm_eps'):
        convert_checkpoint(source, destination, vit())
    small = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'embed_dim=48', 'depth=2', 'num_heads=3']
    report = run(['convert', source, destination, *small, 'img_size=32', '--allow-differences'])
    assert report.matched == report.total


def test_the_model_of_a_timm_config_is_compared(tmp_path):
    export_model(vit(num_heads=2, act_layer='relu'), tmp_path, {'input_size': (3, 32, 32)})
    with pytest.raises(ValueError, match=r'num_heads=2.*other numbers of attention heads and activations'):
        load_checkpoint(vit(), tmp_path)
    assert load_checkpoint(vit(num_heads=2, act_layer='relu', img_size=64), tmp_path).matched
    export_model(timm.create_model('test_efficientnet', num_classes=0, bn_eps=0.1), tmp_path)
    model = timm.create_model('test_efficientnet', num_classes=0)
    with pytest.raises(ValueError, match='epsilons of BatchNorm'):
        load_checkpoint(model, tmp_path)
    assert load_checkpoint(model, tmp_path, allow_differences=True).matched


def test_the_heads_and_epsilon_of_an_open_clip_config_are_compared(tmp_path):
    open_clip = pytest.importorskip('open_clip', reason="needs the 'test-formats' extra")
    vision = dict(layers=2, width=64, head_width=16, patch_size=8, image_size=32, norm_kwargs={'eps': 1e-3})
    text = dict(context_length=8, vocab_size=32, width=32, heads=2, layers=1)
    module = randomized(open_clip.model.CLIP(16, vision, text))
    (tmp_path / 'open_clip_model.safetensors').write_bytes(save(module.state_dict()))
    config = {'model_cfg': {'vision_cfg': vision, 'quick_gelu': False}, 'preprocess_cfg': {}}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(config))
    options = dict(num_classes=0, embed_dim=64, depth=2, patch_size=8, img_size=32)
    with pytest.raises(ValueError, match=r'with eps 0.001.*with 4 attention heads'):
        load_checkpoint(timm.create_model('vit_base_patch32_clip_224', num_heads=2, **options), tmp_path)
    norm_layer = functools.partial(nn.LayerNorm, eps=1e-3)
    model = timm.create_model('vit_base_patch32_clip_224', num_heads=4, norm_layer=norm_layer, **options).eval()
    load_checkpoint(model, tmp_path)
    with torch.no_grad():
        assert (model(picture(32)) @ module.visual.proj - module.encode_image(picture(32))).abs().max() < 1e-5


@pytest.mark.parametrize(
    'hub_id, expected',
    [
        ('owner/name', ('owner/name', '', '')),
        ('owner/name@v2', ('owner/name', '', 'v2')),
        ('owner/name/deep/file.pth@refs/pr/1', ('owner/name', 'deep/file.pth', 'refs/pr/1')),
    ],
)
def test_a_hub_id_has_a_repository_a_file_and_a_revision(hub_id, expected):
    assert split_hub_id(hub_id) == expected
    # the card names the repository as the base model, neither the file nor the revision
    assert _base_model({'initial_checkpoint': '', 'pretrained_path': f'hf-hub:{hub_id}'}) == 'owner/name'
