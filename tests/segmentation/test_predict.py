"""Masks that a segmentation model predicts"""

import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from segmentation_models import create

from timm_coretune.__main__ import main
from timm_coretune.data.images import set_limit
from timm_coretune.segmentation import export_segmentation_model, load_segmentation_model, predict_image
from timm_coretune.segmentation.__main__ import run as run_command
from timm_coretune.segmentation.data import scenes as sample
from timm_coretune.segmentation.data.masks import read_mask
from timm_coretune.segmentation.data.palette import voc_palette
from timm_coretune.segmentation.data.transforms import restore
from timm_coretune.segmentation.outputs import _prepare, _refuse_same_masks, find_images
from timm_coretune.segmentation.predict import classes_of_pixels, predict


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


def peculiar(kind, num_classes, height, width):
    logits = torch.randn(num_classes, height, width)
    if kind == 'ties':
        return logits.round()
    if kind == 'not finite':
        logits[:, ::3, ::5] = torch.tensor([float('nan'), float('inf'), -float('inf')])[
            torch.randint(3, (num_classes, 1, 1))
        ]
        logits[num_classes // 2, 0] = float('nan')
    if kind == 'channels_last':
        return logits[None].contiguous(memory_format=torch.channels_last)[0]
    return logits


@pytest.mark.parametrize('kind', ['plain', 'ties', 'not finite', 'channels_last'])
@pytest.mark.parametrize(
    ('num_classes', 'size'),
    [(2, (1, 7)), (4, (64, 64)), (21, (333, 500)), (21, (1001, 77)), (255, (90, 131)), (1, (9, 9))],
)
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_the_classes_of_pixels_are_those_of_all_logits_at_once(kind, num_classes, size, device):
    logits = peculiar(kind, num_classes, 64, 96).to(device)
    expected = restore(logits, size).argmax(dim=0)
    found = classes_of_pixels(logits, size)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)


def read_status(key):
    return 1024 * int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])


def test_the_memory_for_a_large_image_does_not_grow_with_the_number_of_classes():
    model = create('test_resnet', num_classes=32, output_stride=8).eval()
    model.data_config = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.1), 'interpolation': 'bilinear'}
    predict_image(model, picture((40, 30)))
    image = picture((1800, 1200))
    try:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    except OSError:
        pytest.skip('this system does not tell the peak of the memory')
    before = read_status('VmRSS')
    mask = predict_image(model, image)
    more = (read_status('VmHWM') - before) / mask.numel()
    assert mask.shape == (1200, 1800)
    assert more < 32, f'{more:.0f} bytes per pixel'  # all logits at once are 128


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


def contents(folder):
    """Names of all that is below a folder, with the bytes of files and the targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob('*')
    }


def same_folder(images):
    return [images], images


def through_a_link(images):
    (images.parent / 'link').symlink_to(images)
    return [images], images.parent / 'link'


def one_file(images):
    return [images / 'a.png', images / 'b.jpg'], images


def one_of_another_folder(images):
    picture((20, 20)).save(images.parent / 'b.jpg')
    return [images / 'a.png', images.parent / 'b.jpg'], images


def links_to_the_images(images):
    output = images.parent / 'masks'
    output.mkdir()
    (output / 'a.png').symlink_to(images / 'a.png')
    return [images], output


def hard_links_to_the_images(images):
    output = images.parent / 'masks'
    output.mkdir()
    os.link(images / 'b.jpg', output / 'b.png')
    return [images], output


def images_that_are_links_into_the_folder(images):
    links = images.parent / 'links'
    links.mkdir()
    (links / 'a.jpg').symlink_to(images / 'a.png')
    return [links], images


@pytest.mark.parametrize('overwrite', [False, True], ids=['keep', 'overwrite'])
@pytest.mark.parametrize(
    'arrange',
    [
        *(same_folder, through_a_link, one_file, one_of_another_folder, links_to_the_images, hard_links_to_the_images),
        images_that_are_links_into_the_folder,
    ],
)
def test_no_mask_takes_the_place_of_an_image(tmp_path, arrange, overwrite):
    (tmp_path / 'images').mkdir()
    for name in ('a.png', 'b.jpg'):
        picture((20, 20)).save(tmp_path / 'images' / name)
    paths, output = arrange(tmp_path / 'images')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r'Choose another --output\.|would give the same mask'):
        predict(None, [str(path) for path in paths], str(output), overwrite)
    assert contents(tmp_path) == before


def test_masks_may_lie_below_the_images_and_beside_an_image_of_another_name(exported, tmp_path):
    model = load_segmentation_model(exported)
    images = tmp_path / 'images'
    images.mkdir()
    picture((20, 20)).save(images / 'a.jpg')
    before = (images / 'a.jpg').read_bytes()
    for _ in range(2):
        assert predict(model, [str(images)], str(images / 'masks'), overwrite=True) == 1
    assert predict(model, [str(images / 'a.jpg')], str(images)) == 1
    assert (images / 'a.jpg').read_bytes() == before
    assert sorted(contents(images)) == ['a.jpg', 'a.png', 'masks', 'masks/a.png']


def test_masks_are_written_through_no_link_and_a_link_is_kept_without_overwrite(exported, tmp_path):
    model = load_segmentation_model(exported)
    picture((20, 20)).save(tmp_path / 'a.jpg')
    output = tmp_path / 'masks'
    output.mkdir()
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    (output / 'a.png').symlink_to(tmp_path / 'nowhere')
    (output / 'a.png.tmp').symlink_to(victim)
    assert predict(model, [str(tmp_path / 'a.jpg')], str(output)) == 0
    assert predict(model, [str(tmp_path / 'a.jpg')], str(output), overwrite=True) == 1
    assert victim.read_text() == 'mine'
    assert not (tmp_path / 'nowhere').exists()
    assert read_mask(output / 'a.png', 'a').shape == (20, 20)


def output_is_a_file(output):
    output.write_text('mine')


def output_is_a_link_to_nothing(output):
    output.symlink_to('nothing')


def a_mask_is_a_folder(output):
    (output / 'a.png').mkdir(parents=True)


@pytest.mark.parametrize('arrange', [output_is_a_file, output_is_a_link_to_nothing, a_mask_is_a_folder])
def test_a_folder_that_cannot_take_the_masks_is_refused_before_a_model_is_loaded(tmp_path, capsys, arrange):
    picture((20, 20)).save(tmp_path / 'a.jpg')
    arrange(tmp_path / 'masks')
    words = ['predict', 'no-model', str(tmp_path / 'a.jpg'), '--output', str(tmp_path / 'masks'), '--overwrite']
    with pytest.raises(SystemExit) as stopped:
        run_command(words)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if 'error: ' in line]
    assert re.search(r'Expected (a folder to write masks to in|to write the mask) .*masks', line)


def test_names_that_differ_by_case_are_refused_where_the_file_system_ignores_it(tmp_path):
    for folder, name in (('x', 'a.jpg'), ('y', 'A.png')):
        (tmp_path / folder).mkdir()
        picture((20, 20)).save(tmp_path / folder / name)
    images = find_images([str(tmp_path / 'x'), str(tmp_path / 'y')])
    assert len(images) == 2
    _refuse_same_masks(images, folds_case=False)
    with pytest.raises(ValueError, match=r'a\.jpg.*A\.png.*same mask'):
        _refuse_same_masks(images, folds_case=True)
    (tmp_path / 'probe').write_text('')
    assert _prepare(str(tmp_path / 'masks')) == (tmp_path / 'PROBE').exists()
    assert list((tmp_path / 'masks').iterdir()) == []


def fifo(path):
    os.mkfifo(path)


def listening_socket(path):
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(path))  # the full path may be too long for a socket
    listening.close()


def device(path):
    path.symlink_to('/dev/zero')


def link_to_nothing(path):
    path.symlink_to('nothing')


KINDS = {fifo: 'a named pipe', listening_socket: 'a socket', device: 'a device', link_to_nothing: 'a symbolic link to'}


@pytest.mark.parametrize('make', KINDS)
def test_what_is_no_file_is_counted_and_not_opened(exported, tmp_path, messages, monkeypatch, make):
    images = tmp_path / 'images'
    images.mkdir()
    monkeypatch.chdir(images)
    picture((20, 20)).save(images / 'a.png')
    make(images / 'b.png')
    (images / 'c.png').mkdir()
    (images / 'notes.txt').write_text('no image')
    assert predict(load_segmentation_model(exported), [str(images)], str(tmp_path / 'masks')) == 1
    regular, ending = messages('WARNING')
    assert regular.startswith('2 left out, as they are no regular files: ')
    assert f'b.png ({KINDS[make]}' in regular
    assert 'c.png (a folder)' in regular
    assert ending.startswith('1 left out, as they are no images by their endings')
    with pytest.raises(ValueError, match=f'Expected an image in .*b.png.: it is {KINDS[make]}'):
        predict(None, [str(images / 'b.png')], str(tmp_path / 'masks'))


def test_an_image_of_too_many_pixels_is_named_with_the_way_to_allow_it(exported, tmp_path, monkeypatch):
    model = load_segmentation_model(exported)
    path = tmp_path / 'large.png'
    picture((30, 20)).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match=r'large\.png.*it has 600 pixels.*CORETUNE_MAX_PIXELS=600'):
        predict(model, [str(path)], str(tmp_path / 'masks'))
    set_limit('600')
    assert predict(model, [str(path)], str(tmp_path / 'masks')) == 1
    with pytest.raises(ValueError, match='number of pixels in the variable CORETUNE_MAX_PIXELS'):
        set_limit('many')


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


def test_the_command_of_classifiers_predicts_masks_with_a_model_of_segmentation(tmp_path):
    export_segmentation_model(create('test_resnet', output_stride=8), str(tmp_path / 'model'))
    picture((40, 30)).save(tmp_path / 'a.png')
    main(['predict', str(tmp_path / 'model'), str(tmp_path / 'a.png'), '--output', str(tmp_path / 'masks')])
    expected = predict_image(load_segmentation_model(tmp_path / 'model'), Image.open(tmp_path / 'a.png'))
    assert torch.equal(read_mask(tmp_path / 'masks' / 'a.png', 'the mask').long(), expected.long())
