"""Masks that a segmentation model predicts"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from timm_coretune.segmentation import load_segmentation_model, predict_image
from timm_coretune.segmentation.__main__ import run as run_command
from timm_coretune.segmentation.data import scenes as sample
from timm_coretune.segmentation.data.masks import read_mask
from timm_coretune.segmentation.data.palette import voc_palette
from timm_coretune.segmentation.predict import find_images, predict


def picture(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)


def predict_by_hand(model, image):
    """The whole image at its aspect ratio in the upper left, the mean around it, and logits back to its size."""
    width, height = image.size
    scale = min(model.img_size[0] / height, model.img_size[1] / width)
    content = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, content, mode='bilinear', antialias=True) / 255
    mean, std = (torch.tensor(model.data_config[key])[:, None, None] for key in ('mean', 'std'))
    canvas = torch.zeros(1, 3, *model.img_size)
    canvas[..., : content[0], : content[1]] = (pixels - mean) / std
    with torch.inference_mode():
        logits = model(canvas)[..., : content[0], : content[1]]
        return F.interpolate(logits, (height, width), mode='bilinear')[0].argmax(dim=0)


@pytest.mark.parametrize('size', [(64, 64), (31, 77), (150, 41), (33, 20), (3, 200)], ids=str)
def test_a_mask_has_the_size_of_its_image_and_is_what_validation_computes(exported, size):
    model = load_segmentation_model(exported)
    image = picture(size)
    mask = predict_image(model, image)
    assert (mask.shape, mask.dtype) == ((size[1], size[0]), torch.uint8)
    expected = predict_by_hand(model, image)
    assert torch.equal(mask.long(), expected)
    assert len(expected.unique()) > 1
    as_tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(predict_image(model, as_tensor), mask)


def test_masks_are_palette_files_and_those_that_are_there_are_left_alone(exported, tmp_path):
    model = load_segmentation_model(exported)
    images, output = tmp_path / 'images', tmp_path / 'masks'
    images.mkdir()
    for seed, name in enumerate(['a.png', 'b.jpg', 'c.PNG']):
        picture((37, 52), seed).save(images / name)
    (images / 'notes.txt').write_text('no image')
    assert predict(model, [str(images)], str(output)) == 3
    assert sorted(path.name for path in output.iterdir()) == ['a.png', 'b.png', 'c.png']
    expected = predict_image(model, Image.open(images / 'c.PNG'))
    assert torch.equal(read_mask(output / 'c.png', 'c'), expected)
    with Image.open(output / 'c.png') as mask:
        assert mask.mode == 'P'
        palette = mask.getpalette()
        assert palette == voc_palette()[: len(palette)]
    (output / 'a.png').write_text('mine')
    (output / 'b.png').unlink()
    assert predict(model, [str(images)], str(output)) == 1
    assert (output / 'a.png').read_text() == 'mine'
    assert predict(model, [str(images)], str(output), overwrite=True) == 3
    assert read_mask(output / 'a.png', 'a').shape == (52, 37)


def test_the_mask_of_a_photo_is_as_a_viewer_shows_it(exported, tmp_path):
    model = load_segmentation_model(exported)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((64, 32)).save(tmp_path / 'photo.png', exif=exif)
    (tmp_path / '._photo.png').write_bytes(b'\0\5\x16\7')  # as macOS writes
    assert predict(model, [str(tmp_path)], str(tmp_path / 'masks')) == 1
    mask = read_mask(tmp_path / 'masks' / 'photo.png', 'photo')
    assert mask.shape == (64, 32)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / 'photo.png'))
    assert torch.equal(mask.long(), predict_by_hand(model, shown))


def test_what_is_below_full_transparency_changes_no_prediction(exported):
    model = load_segmentation_model(exported)
    image = picture((40, 40))
    image.paste((255, 255, 255), (0, 0, 20, 40))
    alpha = Image.new('L', (40, 40), 255)
    alpha.paste(0, (0, 0, 20, 40))
    transparent = picture((40, 40), seed=5)
    transparent.paste(image.crop((20, 0, 40, 40)), (20, 0))
    transparent.putalpha(alpha)
    assert torch.equal(predict_image(model, transparent), predict_image(model, image))


def test_images_of_the_same_name_no_images_and_unreadable_ones_are_refused(exported, tmp_path):
    picture((20, 20)).save(tmp_path / 'a.png')
    picture((20, 20)).save(tmp_path / 'a.jpg')
    with pytest.raises(ValueError, match=r'a\.jpg.*a\.png.*same mask'):
        find_images([str(tmp_path)])
    assert find_images([str(tmp_path / 'a.png')] * 2) == [str(tmp_path / 'a.png')] * 2
    with pytest.raises(ValueError, match='found none'):
        find_images([str(exported)])
    (tmp_path / 'broken.png').write_bytes((tmp_path / 'a.png').read_bytes()[:60])
    model = load_segmentation_model(exported)
    for path in (tmp_path / 'broken.png', tmp_path / 'missing.png'):
        with pytest.raises(ValueError, match=f'Expected an image in .*{path.name}'):
            predict(model, [str(path)], str(tmp_path / 'masks'))


def test_the_commands_write_a_sample_and_masks(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, 'NUM_SCENES', (6, 3))
    run_command(['sample', 'scenes'])
    assert capsys.readouterr().out == 'Written: scenes\n'
    lists = {path.stem: path.read_text().split() for path in (tmp_path / 'scenes').rglob('*.txt')}
    pictures = sorted((tmp_path / 'scenes').rglob('JPEGImages/*'))
    masks = sorted((tmp_path / 'scenes').rglob('SegmentationClass/*.png'))
    assert [path.stem for path in pictures] == [path.stem for path in masks]
    assert {name: len(lines) for name, lines in lists.items()} == {'train': 6, 'validation': 3, 'classes': 12}
    assert sorted(lists['train'] + lists['validation']) == [path.stem for path in pictures]
    image = str(pictures[0])
    run_command(['predict', str(exported), image, '--output', 'masks', '--device', 'cpu'])
    assert capsys.readouterr().out == 'Written: 1 masks to masks\n'
    model = load_segmentation_model(exported)
    with Image.open(image) as opened:
        expected = predict_image(model, opened)
    assert torch.equal(read_mask(tmp_path / 'masks' / f'{pictures[0].stem}.png', 'mask'), expected)
    with pytest.raises(SystemExit) as stopped:
        run_command(['predict', 'elsewhere', image, '--output', 'masks'])
    assert stopped.value.code == 2
    assert "found none at 'elsewhere'" in capsys.readouterr().err
