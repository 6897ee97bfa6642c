"""A model that is built for images of one size is built for those of --img-size, and its config says so"""

import pytest
import timm
import torch
from runs import train

from timm_coretune.export import save_weights
from timm_coretune.segmentation import load_segmentation_model
from timm_coretune.train import segmentation
from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.settings import DataSettings
from timm_coretune.train.image_size import size_arguments

TINY = ('embed_dim=16', 'depth=2', 'num_heads=2')  # arguments of a ViT that take no time


@pytest.mark.parametrize(
    'name, kwargs, flags, expected',
    [
        ('vit_tiny_patch16_224', {}, dict(img_size=64), {'img_size': 64}),
        ('vit_tiny_patch16_224', {}, dict(input_size=[3, 64, 64]), {'img_size': 64}),
        ('vit_tiny_patch16_224', {}, dict(input_size=[1, 64, 96]), {'img_size': (64, 96)}),
        ('vit_small_patch14_dinov2', {'depth': 1}, dict(img_size=70), {'img_size': 70}),
        ('beit_base_patch16_224', {'depth': 1}, dict(img_size=64), {'img_size': 64}),
        ('levit_128s', {}, dict(img_size=256), {'img_size': 256}),
        # as before: the model takes them as it is, or was told what to do
        ('resnet18', {}, dict(img_size=64), {}),
        ('test_vit', {}, dict(img_size=64), {}),
        ('crossvit_tiny_240', {}, dict(img_size=272), {}),
        ('vit_tiny_patch16_224', {'dynamic_img_size': True}, dict(img_size=64), {}),
        ('vit_tiny_patch16_224', {'img_size': 64}, dict(img_size=64), {}),
        ('vit_tiny_patch16_224', {}, dict(img_size=224), {}),
        ('vit_tiny_patch16_224', {}, dict(), {}),
    ],
)
def test_a_model_of_one_size_gets_that_of_the_images(name, kwargs, flags, expected):
    state = torch.get_rng_state()
    assert size_arguments(name, kwargs, DataSettings(**flags)) == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    'name, kwargs, size, message',
    [
        ('vit_tiny_patch16_224', {'img_size': 96}, 64, 'the images are 64 x 64 px, --model-kwargs img_size=96 builds'),
        ('vit_tiny_patch16_224', {'depth': 1}, 8, 'timm cannot build vit_tiny_patch16_224 for images of 8 x 8 px'),
        ('efficientformer_l1', {}, 256, 'timm cannot build efficientformer_l1 .* Its own size is 224 x 224 px'),
    ],
)
def test_a_size_that_cannot_be_is_refused_in_one_sentence(name, kwargs, size, message):
    with pytest.raises(ValueError, match=message) as error:
        size_arguments(name, kwargs, DataSettings(img_size=size))
    assert '\n' not in str(error.value)


def test_pixels_that_no_patch_covers_are_counted(messages):
    size_arguments('vit_small_patch14_dinov2', {'depth': 1}, DataSettings(img_size=64))
    assert any('8 and 8 px at the lower and right edge of an image are not seen' in message for message in messages())


@pytest.mark.parametrize(
    'name, size',
    [('vit_tiny_patch16_224', ('--img-size', 48)), ('vit_small_patch14_dinov2', ('--input-size', 3, 48, 32))],
)
def test_the_flag_alone_trains_a_vit_whose_config_loads(tmp_path, data, name, size):
    folder = train(data, tmp_path, '--model', name, '--model-kwargs', *TINY, *size, '--epochs', 1, '--coretune')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    height, width = (48, 48) if len(size) == 2 else size[2:]
    assert tuple(model.patch_embed.img_size) == (height, width)
    assert timm.data.resolve_model_data_config(model)['input_size'] == (3, height, width)
    assert model(torch.zeros(1, 3, height, width)).isfinite().all()
    if height == width:  # a run that starts from this one takes another size
        again = train(data, tmp_path / 'again', '--model', folder, '--img-size', 32, '--epochs', 1)
        assert tuple(timm.create_model(f'local-dir:{again}', pretrained=True).patch_embed.img_size) == (32, 32)


def test_the_flag_alone_segments_with_a_transformer_that_cannot_be_resized_later(tmp_path):
    words = ['--segmentation', '--model', 'beit_base_patch16_224', '--model-kwargs', *TINY]
    settings = parse_args([*words, '--input-size', '3', '48', '64', '--data-dir', '.']).settings
    model, data_config = segmentation.create_model(settings, 4, verbose=False)
    segmentation.save_config(model, str(tmp_path), data_config, None)
    save_weights(model.state_dict(), str(tmp_path / 'model_best.safetensors'))
    loaded = load_segmentation_model(tmp_path)
    assert tuple(loaded.img_size) == (48, 64)
    assert loaded(torch.zeros(1, 3, 48, 64)).shape == (1, 4, 48, 64)
