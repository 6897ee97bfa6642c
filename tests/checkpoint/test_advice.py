"""What is said of a checkpoint that does not fit: the right reading, and a call whose model it fits"""

import re
import shlex

import pytest
import timm
import torch
import torchvision
from checkpoint_formats import fb_convnext, put

from timm_coretune import convert_checkpoint, inspect_checkpoint, load_checkpoint
from timm_coretune.checkpoint.__main__ import run
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.model import create_backbone

VIT, SWIN, CONVNEXT = 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'convnext_atto'
SMALL = {
    VIT: dict(embed_dim=48, depth=2, num_heads=3),
    SWIN: dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
    CONVNEXT: dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    'vit_small_patch16_dinov3': dict(embed_dim=48, depth=2, num_heads=3),
    'vit_small_patch14_dinov2': dict(embed_dim=48, depth=2, num_heads=3),
    'eva02_tiny_patch14_224': dict(embed_dim=48, depth=2, num_heads=3),
    'beit_base_patch16_224': dict(embed_dim=48, depth=2, num_heads=3),
    'deit_tiny_distilled_patch16_224': dict(embed_dim=48, depth=2, num_heads=3),
}


def create(name=VIT, num_classes=0, **kwargs):
    return timm.create_model(name, num_classes=num_classes, **{**SMALL.get(name, {}), **kwargs}).eval()


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture
def save(tmp_path):
    def write(content):
        torch.save(content, tmp_path / 'checkpoint.pth')
        return str(tmp_path / 'checkpoint.pth')

    return write


def refusal(model, file, **kwargs):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match='Expected ') as caught:
        load_checkpoint(model, file, **kwargs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


def advised(message):
    """The call and the flags of train.py in an error."""
    found = re.search(r'create it with (timm\.create_model\(.*?\)) \(train\.py: (.*?)\)\.( |$)', message)
    assert found, message
    return found[1], found[2]


@torch.no_grad()
def outputs(model, channels=3):
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or (64, 64)
    image = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    return features, pooled


def assert_same_outputs(one, other, channels=3):
    for expected, ours in zip(outputs(one, channels), outputs(other, channels), strict=True):
        assert (expected - ours).abs().max() <= 1e-5


# which reading is described


@pytest.mark.parametrize(
    'given, trained, parts',
    [
        ({}, dict(depth=3), ['12 of the file have no place in the model (blocks.2.']),
        (dict(depth=12), {}, ['120 are missing (blocks.10.']),
        ({}, dict(embed_dim=96), ['30 are missing because they have another shape', '.proj.bias (96,) for (48,)']),
        ({}, dict(embed_dim=96, depth=3), ['30 are missing because', '12 of the file have no place']),
    ],
    ids=['deeper', 'much-shallower', 'wider', 'wider-and-deeper'],
)  # fmt: skip
def test_the_reading_that_shares_most_names_is_described(given, trained, parts, save):
    content = {
        **put('net.enc.', create(**trained).state_dict()),
        **put('other.', {f'x{i}': torch.zeros(1) for i in range(90)}),
    }
    message = refusal(create(**given), save(content))
    assert 'at net.enc: ' in message
    for part in parts:
        assert part in message
    assert 'other.x' not in message
    assert ' 0 ' not in message


def test_of_two_copies_the_one_that_fills_more_is_described(save):
    wide, short = create(embed_dim=96).state_dict(), create().state_dict()
    del short['norm.weight']
    message = refusal(create(), save({'teacher': wide, 'net': short}), allow_partial=False)
    assert 'at net: 1 are missing (norm.weight).' in message


@pytest.mark.parametrize(
    'content, part',
    [
        ({'dist_token': torch.zeros(1, 1, 48), 'pos_embed': torch.zeros(1, 198, 48)}, '(dist_token); it has 1 pos'),
        ({'reg_token': torch.zeros(1, 4, 48)}, '1 of the file have no place in the model (reg_token)'),
        ({'some.adapter': torch.zeros(3), 'norm.bias': torch.zeros(5)}, 'have no place in the model (some.adapter)'),
        ({'pos_embed': torch.zeros(1, 198, 48)}, 'it has 1 position embedding(s) more than the model'),
    ],
    ids=['distillation-token', 'registers', 'unknown', 'one-more-position'],
)  # fmt: skip
def test_what_the_model_has_no_place_for_is_named(content, part, save):
    assert part in refusal(create(), save({**create().state_dict(), **content}))


def test_names_of_other_libraries_are_read_for_another_depth(save):
    """timm's filter fails on blocks that the model lacks, so the rest of the file has to be named without them."""
    trained = randomized(create(CONVNEXT, depths=(1, 1, 3, 1)))
    file = save(fb_convnext(trained.state_dict(), None))
    message = refusal(create(CONVNEXT), file)
    assert "timm's filter" in message
    assert 'are missing' not in message
    model = eval(advised(message)[0])
    load_checkpoint(model, file)
    assert_same_outputs(trained, model.eval())


def test_empty_tensors_of_zero_3_are_told(save):
    content = {name: torch.zeros(0) for name in create().state_dict()}
    message = refusal(create(), save({'module': content, 'ds_version': '0.15'}))
    for part in ('30 of 30', 'zero_to_fp32.py', 'DeepSpeed'):
        assert part in message
    assert 'None of the timm models' not in message


@pytest.mark.parametrize(
    'content, what, fix',
    [
        ({f'_fsdp.{i}._flat_param': torch.zeros(9) for i in range(9)}, 'FSDP', 'FULL_STATE_DICT'),
        ({f'base_model.blocks.{i}.attn.qkv.lora_A.weight': torch.zeros(4, 48) for i in range(9)}, 'LoRA', 'merge'),
        ({f'blocks.{i}.attn.qkv.parametrizations.weight.original0': torch.zeros(9) for i in range(9)},
         'parametrization', 'remove_parametrizations'),
    ],
    ids=['fsdp', 'lora', 'parametrization'],
)  # fmt: skip
def test_weights_in_another_form_are_told_with_the_way_out(content, what, fix, save):
    message = refusal(create(), save(content))
    assert what in message
    assert fix in message


# the call


CALLS = [
    (VIT, dict(init_values=1e-5, in_chans=13)),
    (VIT, dict(reg_tokens=4)),
    (VIT, dict(reg_tokens=4, no_embed_class=True, img_size=96)),
    (VIT, dict(class_token=False, global_pool='avg')),
    (VIT, dict(class_token=False, global_pool='avg', fc_norm=False)),
    (VIT, dict(class_token=False, global_pool='map')),
    (VIT, dict(global_pool='avg')),
    (VIT, dict(qkv_bias=False, qk_norm=True)),
    (VIT, dict(img_size=96, patch_size=8, mlp_ratio=2.7)),
    (VIT, dict(pre_norm=True, final_norm=False)),
    (VIT, dict(pos_embed='none', proj_bias=False, scale_mlp_norm=True, scale_attn_norm=True)),
    (VIT, dict(depth=5)),
    ('vit_small_patch14_dinov2', dict(reg_tokens=4, img_size=112)),
    ('deit_tiny_distilled_patch16_224', dict(in_chans=4, img_size=64)),
    ('vit_small_patch16_dinov3', dict(in_chans=6, num_reg_tokens=0, mlp_ratio=3.0)),
    ('eva02_tiny_patch14_224', dict(init_values=1e-5, num_reg_tokens=4, img_size=56)),
    ('beit_base_patch16_224', dict(img_size=96, depth=3, use_abs_pos_emb=True)),
    (SWIN, dict(window_size=4, img_size=128, in_chans=4)),
    (SWIN, dict(depths=(2, 2, 4, 2), mlp_ratio=2.0, qkv_bias=False)),
    (SWIN, dict(embed_dim=48, num_heads=(2, 4, 8, 16))),
    (CONVNEXT, dict(in_chans=13, kernel_sizes=5, patch_size=2)),
    (CONVNEXT, dict(depths=(2, 2, 3, 2), dims=(16, 24, 32, 40), use_grn=True)),
    ('convnextv2_atto', dict(ls_init_value=1e-6, use_grn=False, conv_bias=False)),
    ('test_resnet', dict(in_chans=13)),
    ('resnet18', dict(stem_type='deep_tiered', stem_width=32, avg_down=True, in_chans=5)),
    ('resnet18', dict(block_args=dict(attn_layer='se'))),
    ('resnet50', dict(layers=(1, 1, 2, 1), cardinality=32, base_width=8)),
    ('test_efficientnet', dict(in_chans=13)),
    ('test_byobnet', dict(in_chans=4)),
]  # fmt: skip


@pytest.mark.parametrize('name, arguments', CALLS, ids=[f'{n}-{"-".join(a)}' for n, a in CALLS])
def test_the_call_of_the_answer_computes_what_was_trained(name, arguments, save):
    trained = randomized(create(name, **arguments))
    file = save({'state_dict': put('net.enc.', trained.state_dict())})
    message = refusal(create(name, num_classes=3), file)
    call, _ = advised(message)
    assert call.startswith(f'timm.create_model({name!r}')
    model = eval(call)
    report = load_checkpoint(model, file)
    assert report.resized == ()
    assert_same_outputs(trained, model.eval(), arguments.get('in_chans', 3))


def test_arguments_that_resize_stay_those_of_the_user(save):
    file = save(create(init_values=1e-5, img_size=96).state_dict())
    call, _ = advised(refusal(create(img_size=64), file))
    assert call == f"timm.create_model('{VIT}', embed_dim=48, depth=2, num_heads=3, img_size=64, init_values=1e-05)"
    assert load_checkpoint(eval(call), file).resized == ('pos_embed',)


def test_arguments_that_the_user_gave_in_vain_are_taken_back(save):
    file = save(create().state_dict())
    call, _ = advised(refusal(create(init_values=1e-5, reg_tokens=4, qkv_bias=False), file))
    assert 'init_values=0, reg_tokens=0, qkv_bias=True' in call
    load_checkpoint(eval(call), file)


def test_another_size_of_a_family_is_found_by_its_digits(save):
    file = save(timm.create_model('mobilenetv3_small_075', num_classes=0, in_chans=4).state_dict())
    call, _ = advised(refusal(timm.create_model('mobilenetv3_small_050', num_classes=0), file))
    assert call == "timm.create_model('mobilenetv3_small_075', in_chans=4)"
    load_checkpoint(eval(call), file)


def test_the_heads_of_another_size_are_those_of_that_size(save):
    file = save(timm.create_model('vit_small_patch16_224', num_classes=0, in_chans=13, weight_init='skip').state_dict())
    call, _ = advised(refusal(timm.create_model('vit_tiny_patch16_224', num_classes=0, num_heads=3), file))
    assert call == "timm.create_model('vit_small_patch16_224', in_chans=13)"


def test_the_number_of_heads_is_said_to_be_assumed(save):
    file = save(create(embed_dim=96, num_heads=6, in_chans=4).state_dict())
    message = refusal(create(), file)
    assert 'num_heads=6' in advised(message)[0]
    assert 'no shape shows the number of attention heads' in message
    with pytest.raises(ValueError, match='no shape shows the number of attention heads.*--model'):
        inspect_checkpoint(file)


def test_what_a_config_tells_is_in_the_call(tmp_path):
    transformers = pytest.importorskip('transformers', reason="needs the 'test-formats' extra")
    size = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, image_size=32)
    config = transformers.ViTConfig(**size, layer_norm_eps=1e-6, hidden_act='relu', num_channels=4)
    trained = randomized(transformers.ViTModel(config).eval())
    trained.save_pretrained(tmp_path)
    call, _ = advised(refusal(create(), str(tmp_path)))
    assert 'num_heads=2' in call
    assert "act_layer='relu'" in call
    model = eval(call)
    load_checkpoint(model, tmp_path)
    image = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model.eval().forward_features(image) - trained(image).last_hidden_state).abs().max() < 1e-5


def test_the_flags_of_the_answer_create_the_model_in_training(save):
    arguments = dict(in_chans=2, init_values=1e-5, class_token=False, global_pool='avg', img_size=96)
    trained = randomized(create(**arguments))
    file = save(trained.state_dict())
    _, flags = advised(refusal(create(), file))
    assert '--in-chans 2 --gp avg --img-size 96' in flags
    words = [*shlex.split(flags), '--pretrained-path', file, '--num-classes', '3']
    settings = parse_args(words).settings
    assert settings.data.img_size == 96
    assert_same_outputs(trained, create_backbone(settings.model, 3, settings.data).eval(), channels=2)


# inspection and conversion


def test_inspection_gives_the_call_too(save, tmp_path, capsys):
    trained = randomized(create('test_vit', in_chans=13, init_values=1e-5, reg_tokens=4))
    file = save({'net': trained.state_dict()})
    report = inspect_checkpoint(file)
    call = "timm.create_model('test_vit', in_chans=13, init_values=1e-05, reg_tokens=4)"
    assert report.call() == call
    assert report.model_args == {'in_chans': 13, 'init_values': 1e-5, 'reg_tokens': 4}
    run(['inspect', file])
    assert f'create it    {call}' in capsys.readouterr().out
    with pytest.raises(ValueError, match=re.escape(call)):
        run(['inspect', file, '--model', 'test_vit'])
    destination = str(tmp_path / 'out.safetensors')
    run(['convert', file, destination])
    loaded = eval(re.search(r'load it +(.*)', capsys.readouterr().out)[1])
    assert_same_outputs(trained, loaded.eval(), channels=13)
    assert convert_checkpoint(file, destination).call() == call


def test_a_model_that_fits_is_found_in_the_size_of_the_file(save):
    file = save(create('test_vit', img_size=96).state_dict())
    report = inspect_checkpoint(file)
    assert report.call() == "timm.create_model('test_vit', img_size=96)"
    assert report.resized == ()


# models that timm did not create


def test_a_model_of_torchvision_is_answered_with_that_of_timm(save):
    file = save(timm.create_model('resnet18', num_classes=0).state_dict())
    message = refusal(torchvision.models.resnet18(), file)
    assert message.startswith('Expected a model of timm, got ResNet of torchvision.models.resnet.')
    assert "In timm the network passed is timm.create_model('resnet18')." in message
    call, _ = advised(message)
    assert call == "timm.create_model('resnet18')"
    load_checkpoint(eval(call), file)


def test_a_vit_of_torchvision_raises_no_attribute_error(save):
    model = torchvision.models.VisionTransformer(32, 16, 2, 3, 48, 192, num_classes=5)
    message = refusal(model, save(timm.create_model('test_vit', num_classes=0).state_dict()))
    assert 'got VisionTransformer of torchvision.models.vision_transformer' in message
    assert advised(message)[0] == "timm.create_model('test_vit')"


@pytest.mark.parametrize('wrap, inner', [(torch.nn.DataParallel, 'module'), (torch.nn.Sequential, '0')])
def test_the_timm_model_inside_of_another_is_named(wrap, inner, save):
    message = refusal(wrap(create()), save(create().state_dict()))
    assert f'which holds one as {inner!r}' in message


# loads that said nothing


@pytest.mark.parametrize(
    'name, given, trained',
    [
        ('beit_base_patch16_224', {}, dict(use_abs_pos_emb=True)),
        (VIT, dict(pos_embed='none'), {}),
        (VIT, dict(no_embed_class=True), dict(no_embed_class=True, reg_tokens=4)),
        (
            VIT,
            dict(no_embed_class=True, class_token=False, global_pool='avg', fc_norm=False),
            dict(no_embed_class=True),
        ),
    ],
    ids=['beit-positions', 'vit-positions', 'registers', 'class-token'],
)
def test_tokens_and_positions_that_the_model_lacks_are_not_dropped(name, given, trained, save):
    assert 'of the file have no place in the model' in refusal(
        create(name, **given), save(create(name, **trained).state_dict())
    )


def test_a_model_whose_patch_size_is_one_number_is_loaded(save):
    trained = create('xcit_nano_12_p16_224', depth=2)
    report = load_checkpoint(create('xcit_nano_12_p16_224', depth=2), save(trained.state_dict()))
    assert report.matched == report.total
    assert not [note for note in report.notes if 'patches' in note]
