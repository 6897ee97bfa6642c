"""What goes wrong in silence elsewhere: the wrong copy, another network of the same shapes, other images"""

import logging
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from checkpoint_formats import clip_tower, create, dino, moco, moco_v3, open_clip, openai_clip, plain, put, weights
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

from timm_coretune import convert_checkpoint, inspect_checkpoint, load_checkpoint
from timm_coretune.checkpoint.__main__ import run

TINY = 'test_resnet'
IMAGENET_MEAN = (0.485, 0.456, 0.406)


@pytest.fixture
def save(tmp_path):
    def write(content, name='checkpoint.pth'):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return write


def is_loaded(model, expected, but=()):
    state = model.state_dict()
    return all(torch.equal(state[k], v) for k, v in expected.items() if not k.startswith(but or '-'))


@pytest.mark.parametrize(
    'key',
    ['encoder_k', 'module.encoder_k.', 'state_dict/encoder_k'],
    ids=['prefix', 'as in the file', 'with container'],
)
def test_another_copy_can_be_asked_for(key, save):
    model = create(TINY)
    report = load_checkpoint(model, save(moco(weights(TINY), weights(TINY, 1))), checkpoint_key=key)
    assert is_loaded(model, weights(TINY, 1))
    assert report.copy == 'state_dict/encoder_k'


def test_the_student_can_be_asked_for(save):
    model = create(TINY)
    load_checkpoint(model, save(dino(weights(TINY), weights(TINY, 1))), checkpoint_key='student')
    assert is_loaded(model, weights(TINY, 1))


def test_a_key_that_is_not_there_is_told(save):
    with pytest.raises(ValueError, match="Expected 'teacher' to name a copy .* state_dict"):
        load_checkpoint(create(TINY), save(moco(weights(TINY), weights(TINY, 1))), checkpoint_key='teacher')


def test_two_copies_that_no_rule_knows_are_left_to_the_user(save):
    file = save({'one': weights(TINY), 'two': put('net.', weights(TINY, 1))})
    model = create(TINY)
    with pytest.raises(ValueError, match='found 2 that differ.*--checkpoint-key.*: one, two/net'):
        load_checkpoint(model, file)
    load_checkpoint(model, file, checkpoint_key='two')
    assert is_loaded(model, weights(TINY, 1))


PAIRS = (
    ('online_network.', 'target_network.', 'online'),
    ('student.', 'teacher.', 'student'),
    ('student/net.', 'teacher/net.', 'student'),
    ('query_encoder.', 'key_encoder.', 'query'),
    ('enc_q.net.', 'enc_k.net.', 'query'),
    ('net.', 'net_ema.', 'trained'),
    ('encoder.', 'momentum_encoder.', 'trained'),
    ('visual_encoder.', 'visual_encoder_m.', 'trained'),
    ('onlineNet.', 'targetNet.', 'online'),
    ('model.onlinenet.', 'model.targetnet.', 'online'),
    ('ema_trainer.online.', 'ema_trainer.slow.', 'online'),
)


@pytest.mark.parametrize('trained, averaged, word', PAIRS, ids=[f'{a}-{b}' for a, b, _ in PAIRS])
def test_of_two_copies_the_one_that_gradients_train_is_taken_by_its_name(trained, averaged, word, save):
    content = {}
    for name, tensors in ((averaged, weights(TINY, 1)), (trained, weights(TINY))):  # in either order
        container, _, prefix = name.rpartition('/')
        content.setdefault(container or 'copies', {}).update(put(prefix, tensors))
    model = create(TINY)
    report = load_checkpoint(model, save(content))
    assert is_loaded(model, weights(TINY))
    assert report.copy == f'{word} encoder'
    assert 'gradients train' in report.why
    assert averaged.rstrip('.') in report.why
    key = averaged.rstrip('.')
    assert load_checkpoint(model, save(content), checkpoint_key=key).why == 'asked for'
    assert is_loaded(model, weights(TINY, 1))


@pytest.mark.parametrize('one, two', [('source.', 'target.'), ('student_a.', 'student_b.'), ('key_a.', 'key_b.')])
def test_names_that_do_not_tell_the_trained_copy_decide_nothing(one, two, save):
    with pytest.raises(ValueError, match='found 2 that differ'):
        load_checkpoint(create(TINY), save({**put(one, weights(TINY)), **put(two, weights(TINY, 1))}))


def test_the_trained_copy_is_the_one_that_is_loaded_in_part(save):
    content = {**put('target.', weights(TINY, 1)), **put('online.', weights(TINY))}
    content = {key: value for key, value in content.items() if not key.endswith('conv1.weight') or 'layer' in key}
    model = create(TINY)
    assert load_checkpoint(model, save(content), allow_partial=True).copy == 'online encoder'


def test_the_same_copy_under_two_names_is_no_question(save):
    model = create(TINY)
    load_checkpoint(model, save({'one': weights(TINY), 'two': {k: v.clone() for k, v in weights(TINY).items()}}))
    assert is_loaded(model, weights(TINY))


@pytest.mark.parametrize(
    'loaded, wanted', [('resnet34', 'resnet18'), ('resnet18', 'resnet34'), ('resnet50', 'resnet18')]
)
def test_another_depth_is_refused_with_the_model_that_would_fit(loaded, wanted, save):
    model = create(wanted)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf'It fits {loaded}: .*--model'):
        load_checkpoint(model, save(weights(loaded)))
    assert is_loaded(model, before)


def test_a_deeper_vit_is_refused_and_a_lost_layer_scale_too(save):
    small = dict(embed_dim=48, num_heads=3, img_size=32)
    model = timm.create_model('vit_tiny_patch16_224', depth=2, num_classes=0, **small)
    deeper = timm.create_model('vit_tiny_patch16_224', depth=3, num_classes=0, **small)
    scaled = timm.create_model('vit_tiny_patch16_224', depth=2, num_classes=0, init_values=1e-5, **small)
    for other in (deeper, scaled):
        with pytest.raises(ValueError, match='of the file have no place in the model'):
            load_checkpoint(model, save(other.state_dict()))


def test_what_fits_of_a_file_is_loaded_where_that_is_allowed(save, caplog):
    half = {k: v for k, v in weights(TINY).items() if not k.startswith('layer4')}
    model = create(TINY)
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, save(half), allow_partial=True)
    assert is_loaded(model, half)
    assert report.missing
    assert all(name.startswith('layer4') for name in report.missing)
    assert report.matched == report.total - len(report.missing)
    assert 'are missing' in caplog.text


def test_a_file_with_less_than_half_of_the_network_is_refused_even_then(save):
    little = {k: v for k, v in weights(TINY).items() if k.startswith(('conv1', 'layer1'))}
    little.update({f'other{i}': torch.zeros(3) for i in range(60)})
    with pytest.raises(ValueError, match='are missing'):
        load_checkpoint(create(TINY), save(little), allow_partial=True)


def test_the_good_case_is_one_line(save, caplog):
    file = save(moco(weights('resnet50'), weights('resnet50', 1)))
    with caplog.at_level(logging.INFO, logger='timm_coretune'):
        report = load_checkpoint(create('resnet50', num_classes=10), file)
    (record,) = [r for r in caplog.records if r.name.startswith('timm_coretune')]
    assert record.getMessage() == (
        f'Loaded {file}: MoCo v1/v2, PCL, query encoder (state_dict/encoder_q.), 318 of 318 backbone tensors, '
        'classifier new.'
    )
    assert len(report.loaded) == 318
    assert {name.split('.')[0] for name in report.dropped} == {'encoder_k', 'encoder_q', 'queue', 'queue_ptr'}


def test_a_classifier_of_the_file_is_loaded_only_on_request(save):
    file = save(timm.create_model(TINY, num_classes=7).state_dict())
    model = create(TINY, num_classes=7)
    assert not load_checkpoint(model, file).classifier
    assert load_checkpoint(model, file, load_classifier=True).classifier
    assert not load_checkpoint(create(TINY, num_classes=6), file, load_classifier=True).classifier


def test_moco_v3_small_needs_twelve_heads(save):
    name = 'vit_small_patch16_224'
    file = save(moco_v3(weights(name), weights(name, 1)))
    model = timm.create_model(name, num_classes=0, depth=2)
    with pytest.raises(ValueError, match='trained with 12 attention heads, this model has 6.*num_heads=12'):
        load_checkpoint(model, file)
    model = timm.create_model(name, num_classes=0, depth=2, num_heads=12)
    assert load_checkpoint(model, file).matched == 2 * 12 + 6


@pytest.mark.parametrize('quick', [False, True])
def test_clip_needs_the_activation_it_was_trained_with(quick, save):
    right, wrong = (f'vit_base_patch32_clip_{q}224' for q in (('quickgelu_', ''), ('', 'quickgelu_'))[not quick])
    file = save(openai_clip(weights(right), None))
    if quick:
        with pytest.raises(ValueError, match='vit_base_patch32_clip_quickgelu_224'):
            load_checkpoint(create(wrong), file)
        assert load_checkpoint(create(right), file).cast
    else:
        file = save(open_clip(weights(right), None))
        assert load_checkpoint(create(right), file).matched


def test_a_network_trained_with_gelu_is_not_loaded_into_quick_gelu(save):
    name = 'vit_tiny_patch16_224'
    model = timm.create_model(name, num_classes=0, act_layer='quick_gelu')
    with pytest.raises(ValueError, match='trained with GELU'):
        load_checkpoint(model, save(dino(weights(name), weights(name, 1))))


@pytest.mark.parametrize(
    'content, what',
    [
        ({'backbone.stages.0.blocks.0.attn.w_msa.qkv.weight': torch.zeros(3)}, 'mmpretrain Swin.*Unfold'),
        ({'module.base_encoder.patch_embed.proj.0.weight': torch.zeros(3)}, 'convolutional stem'),
        ({'backbone.conv1.weight': torch.zeros(64, 3, 3, 3)}, 'stem for small images'),
        ({'net.0.0.0.weight': torch.zeros(3)}, 'converted from TensorFlow'),
        ({'module.encoder1.conv1.weight': torch.zeros(3)}, 'CMC'),
    ],
    ids=['mm-swin', 'moco-v3-conv-stem', 'cifar-stem', 'simclr-tf', 'cmc'],
)
def test_a_network_that_timm_lacks_is_named(content, what, save):
    state_dict = {**content, **{f'x{i}': torch.zeros(2) for i in range(8)}}
    with pytest.raises(ValueError, match=what):
        load_checkpoint(create('resnet18'), save({'state_dict': state_dict}))


def vit(**kwargs):
    return timm.create_model('vit_tiny_patch16_224', num_classes=0, embed_dim=48, depth=2, num_heads=3, **kwargs)


def test_position_embeddings_are_resized_as_timm_does_and_it_is_said(save, caplog):
    source = vit(img_size=64)
    model = vit(img_size=32)
    file = save({'teacher': put('backbone.', source.state_dict()), 'student': {}})
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, file)
    assert report.resized == ('pos_embed',)
    expected = timm.layers.resample_abs_pos_embed(source.pos_embed, [2, 2], [4, 4], num_prefix_tokens=1)
    assert torch.allclose(model.pos_embed, expected)
    assert 'pretrained at 64 px, the model is built for 32 px' in caplog.text
    assert report.data_config['input_size'] == (3, 64, 64)


def test_other_patches_are_resized_too(save):
    report = load_checkpoint(vit(img_size=64, patch_size=8), save(vit(img_size=128, patch_size=16).state_dict()))
    assert report.resized == ('patch_embed.proj.weight',)


def test_the_input_convolution_is_adapted_to_other_channels(save):
    model = timm.create_model('resnet18', num_classes=0, in_chans=1)
    report = load_checkpoint(model, save(weights('resnet18')))
    assert report.resized == ('conv1.weight',)
    assert torch.allclose(model.conv1.weight, weights('resnet18')['conv1.weight'].sum(1, keepdim=True))


def test_the_mean_of_the_method_reaches_the_data_config(save, caplog):
    name = 'vit_tiny_patch16_224'
    model = create(name)
    assert resolve_model_data_config(model)['mean'] == (0.5, 0.5, 0.5)
    other = create(name)
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, save(dino(weights(name), weights(name, 1))))
    assert report.data_config == {'mean': IMAGENET_MEAN, 'std': (0.229, 0.224, 0.225), 'input_size': (3, 224, 224)}
    assert resolve_model_data_config(model)['mean'] == IMAGENET_MEAN
    assert 'normalized with mean (0.485, 0.456, 0.406)' in caplog.text
    assert resolve_model_data_config(other)['mean'] == (0.5, 0.5, 0.5)  # no other model is changed
    assert resolve_model_data_config(model, args={'mean': (0.1, 0.2, 0.3)})['mean'] == (0.1, 0.2, 0.3)


def test_a_mean_that_the_file_does_not_tell_is_said_to_be_kept(save, caplog):
    name = 'vit_tiny_patch16_224'
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(create(name), save(plain(weights(name), None)))
    assert 'mean' not in report.data_config
    assert 'does not tell how images were normalized' in caplog.text


def test_clip_brings_its_own_mean(save):
    name = 'vit_base_patch32_clip_quickgelu_224'
    assert load_checkpoint(create(name), save(openai_clip(weights(name), None))).data_config['mean'][0] == 0.48145466
    bare = clip_tower(weights(name))
    assert 'mean' not in load_checkpoint(create(name), save(bare)).data_config


def test_the_mean_in_the_file_itself_comes_first(tmp_path):
    content = put('encoder_q.', weights(TINY))
    save_file(content, tmp_path / 'moco.safetensors', {'mean': '0.1 0.2 0.3', 'std': '0.4 0.5 0.6'})
    report = load_checkpoint(create(TINY), tmp_path / 'moco.safetensors')
    assert (report.data_config['mean'], report.data_config['std']) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    convert_checkpoint(tmp_path / 'moco.safetensors', tmp_path / 'converted.safetensors')
    assert inspect_checkpoint(tmp_path / 'converted.safetensors').data_config['mean'] == (0.1, 0.2, 0.3)


def test_an_activation_that_the_file_does_not_tell_is_told(save):
    name = 'vit_base_patch32_clip_224'
    (note,) = (n for n in load_checkpoint(create(name), save(open_clip(weights(name), None))).notes if 'GELU' in n)
    assert 'does not tell whether it was trained with QuickGELU' in note


def test_tensors_that_are_not_dense_are_no_weights(save):
    sparse = {**weights(TINY), 'memory': torch.eye(8).to_sparse()}
    assert load_checkpoint(create(TINY), save(sparse)).missing == ()
    sparse['layer1.0.conv1.weight'] = sparse['layer1.0.conv1.weight'].to_sparse()
    with pytest.raises(ValueError, match='1 are missing'):
        load_checkpoint(create(TINY), save(sparse))


def test_half_precision_is_cast_and_it_is_said(save):
    model = create(TINY)
    report = load_checkpoint(
        model, save({k: v.half() if v.is_floating_point() else v for k, v in weights(TINY).items()})
    )
    assert 'conv1.0.weight' in report.cast
    assert model.conv1[0].weight.dtype == torch.float32
    assert is_loaded(model, {k: v.half().float() for k, v in weights(TINY).items()})


def test_large_finite_values_are_no_infinity(save):
    large = {k: torch.full_like(v, 3e38) if v.is_floating_point() else v for k, v in weights(TINY).items()}
    load_checkpoint(create(TINY), save(large))


def test_an_average_pooled_model_starts_its_norm_fresh(save):
    gap = timm.create_model('vit_tiny_patch16_224', global_pool='avg', num_classes=3)
    report = load_checkpoint(gap, save(weights('vit_tiny_patch16_224')))
    assert report.missing == ('fc_norm.bias', 'fc_norm.weight')
    assert not report.left_over
    assert 'start fresh' in ' '.join(report.notes)


def test_a_jax_archive_of_a_vit_is_loaded_whole(tmp_path):
    model = vit(img_size=32)
    draw = np.random.default_rng(0)
    arrays = {
        'embedding/kernel': (16, 16, 3, 48), 'embedding/bias': (48,), 'cls': (1, 1, 48),
        'Transformer/posembed_input/pos_embedding': (1, 5, 48),
        'Transformer/encoder_norm/scale': (48,), 'Transformer/encoder_norm/bias': (48,),
    }  # fmt: skip
    for i in range(2):
        block, attention = f'Transformer/encoderblock_{i}/', 'MultiHeadDotProductAttention_1/'
        for norm in ('LayerNorm_0', 'LayerNorm_2'):
            arrays |= {f'{block}{norm}/scale': (48,), f'{block}{norm}/bias': (48,)}
        for part in ('query', 'key', 'value'):
            arrays |= {f'{block}{attention}{part}/kernel': (48, 3, 16), f'{block}{attention}{part}/bias': (3, 16)}
        arrays |= {f'{block}{attention}out/kernel': (3, 16, 48), f'{block}{attention}out/bias': (48,)}
        arrays |= {f'{block}MlpBlock_3/Dense_0/kernel': (48, 192), f'{block}MlpBlock_3/Dense_0/bias': (192,)}
        arrays |= {f'{block}MlpBlock_3/Dense_1/kernel': (192, 48), f'{block}MlpBlock_3/Dense_1/bias': (48,)}
    values = {k: draw.standard_normal(shape).astype(np.float32) for k, shape in arrays.items()}
    np.savez(tmp_path / 'vit.npz', **values)
    report = load_checkpoint(model, tmp_path / 'vit.npz')
    assert report.matched == report.total
    assert report.kind == 'npz'
    assert torch.equal(model.blocks[1].mlp.fc1.weight, torch.from_numpy(values[f'{block}MlpBlock_3/Dense_0/kernel'].T))


def test_a_converted_file_says_what_it_is_and_loads_strictly(save, tmp_path):
    destination = tmp_path / 'converted.safetensors'
    report = convert_checkpoint(save(moco(weights('resnet18'), weights('resnet18', 1))), destination)
    assert report.architecture == 'resnet18'
    model = timm.create_model('resnet18', num_classes=0, checkpoint_path=str(destination))
    assert is_loaded(model, weights('resnet18'))
    assert sorted(load_file(destination)) == sorted(model.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.pth', 'converted.safetensors']
    with pytest.raises(ValueError, match=r'ends in .safetensors'):
        convert_checkpoint(destination, tmp_path / 'converted.bin')


def test_a_file_that_fits_no_model_is_said_to(save):
    narrow = timm.create_model('resnet18', channels=(8, 16, 24, 32), num_classes=0)
    with pytest.raises(ValueError, match='none of those tried fits .*resnet50.*--model'):
        inspect_checkpoint(save(narrow.state_dict()))


def test_the_command_line_inspects_and_converts(save, tmp_path, monkeypatch, capsys):
    def shown_by(*words):
        run(list(words))
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    save(moco(weights('resnet18'), weights('resnet18', 1)))
    shown = shown_by('inspect', 'checkpoint.pth')
    for part in ('MoCo v1/v2', 'query encoder', 'resnet18', '120 of 120', 'queue (1)'):
        assert part in shown
    shown = shown_by('convert', 'checkpoint.pth', 'out.safetensors', '--checkpoint-key', 'encoder_k')
    assert "timm.create_model('resnet18', num_classes=0, checkpoint_path='out.safetensors')" in shown
    assert torch.equal(load_file('out.safetensors')['conv1.weight'], weights('resnet18', 1)['conv1.weight'])
    small = timm.create_model('vit_tiny_patch16_224', num_classes=0, depth=2)
    save(small.state_dict(), 'small.pth')
    model = ('--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=2')
    assert 'vit_tiny_patch16_224' in shown_by('inspect', 'small.pth', *model)
    shown = shown_by('convert', 'small.pth', 'small.safetensors', *model)
    assert "('vit_tiny_patch16_224', num_classes=0, depth=2, checkpoint_path='small.safetensors')" in shown


def test_the_command_line_tells_an_error_in_one_line(tmp_path):
    command = [sys.executable, '-m', 'timm_coretune.checkpoint', 'inspect', 'nothing.pth']
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.startswith('Error: Expected a checkpoint file or folder')


MEASURE = """
import resource, sys, timm, torch
from timm_coretune import load_checkpoint
torch.set_num_threads(1)
model = timm.create_model('vit_base_patch16_224', num_classes=0)
load_checkpoint(timm.create_model('test_resnet', num_classes=0), sys.argv[2])  # what the first call imports

def memory():
    with open('/proc/self/status') as f:
        return {k: int(v.split()[0]) for k, v in (line.split(':') for line in f) if k in ('VmRSS', 'VmHWM')}

before = memory()['VmRSS']
open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
load_checkpoint(model, sys.argv[1])
size = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1024
print((memory()['VmHWM'] - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak is read from /proc')
def test_loading_safetensors_adds_less_than_a_third_of_the_model_to_memory(tmp_path):
    model = timm.create_model('vit_base_patch16_224', num_classes=0)
    save_file(model.state_dict(), tmp_path / 'vit.safetensors')
    save_file(weights(TINY), tmp_path / 'tiny.safetensors')
    command = [sys.executable, '-c', MEASURE, tmp_path / 'vit.safetensors', tmp_path / 'tiny.safetensors']
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) < 0.3
