"""Emoji as folders of classes and as scenes with masks, from small packages of the same layout as those of npm"""

import io
import json
import shutil
import tarfile
from collections import Counter

import emoji_packages
import make_emoji
import make_emoji_scenes
import numpy as np
import pytest
from PIL import Image, ImageDraw

from timm_coretune.segmentation.data.dataset import open_dataset

VENDORS = ('google', 'twitter', 'fluent')
THINGS = 5
# the same person three times, which counts as one thing
GENDERS = ('1f9d1-200d-1f680', '1f468-200d-1f680', '1f469-200d-1f680')


def code_of(label, number):
    return f'{0x1F400 + 16 * label + number:x}'


def colour_of(vendor, label, number):
    return (60 * VENDORS.index(vendor) + 60, 25 * label + 20, 40 * number + 30)


def draw(vendor, label, number, size):
    """A disc of one colour, half transparent at its edge."""
    image = Image.new('RGBA', (size, size), (0, 0, 0, 0))
    colour = colour_of(vendor, label, number)
    drawing = ImageDraw.Draw(image)
    drawing.ellipse((2, 2, size - 3, size - 3), fill=(*colour, 128))
    drawing.ellipse((6, 6, size - 7, size - 7), fill=(*colour, 255))
    return image


def encode(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind, lossless=True)
    return buffer.getvalue()


@pytest.fixture(scope='session')
def packages(tmp_path_factory):
    """Packages of three vendors as .tgz: 8 subgroups with 5 things each, and what must be left out."""
    folder = tmp_path_factory.mktemp('packages')
    entries, drawn = [], []
    for label, subgroup in enumerate(make_emoji_scenes.SUBGROUPS):
        for number in range(THINGS):
            entries.append({'unified': code_of(label, number).upper(), 'category': 'Things', 'subcategory': subgroup})
            drawn.append((code_of(label, number), label, number))
    roles = make_emoji_scenes.SUBGROUPS.index('person-role')
    for code in GENDERS:
        entries.append({'unified': code.upper(), 'category': 'People & Body', 'subcategory': 'person-role'})
        drawn.append((code, roles, 5))
    # with a variation selector and a leading zero, which fluent writes in another way
    entries.append({'unified': '00A9-FE0F', 'category': 'Things', 'subcategory': 'clothing'})
    for number in range(9):
        entries.append({'unified': f'1F1E{number}', 'category': 'Flags', 'subcategory': 'country-flag'})
        drawn.append((f'1f1e{number}', 0, 0))
    entries.append({'unified': '1FAE8', 'category': 'Things', 'subcategory': 'clothing'})  # not drawn by fluent
    files = {}
    for vendor in VENDORS:
        own = [*drawn, ('a9' if vendor == 'fluent' else '00a9-fe0f', 1, 5)]
        if vendor == 'fluent':
            blobs = {f'assets/{code}.webp': encode(draw(vendor, *rest, 128), 'WEBP') for code, *rest in own}
        else:
            own += [('1fae8', 1, 0), (f'{code_of(0, 0)}-1f3fb', 0, 0)]  # the latter is a variant of skin tone
            blobs = {f'img/{vendor}/64/{code}.png': encode(draw(vendor, *rest, 64), 'PNG') for code, *rest in own}
            blobs['emoji.json'] = json.dumps(entries).encode()
            blobs[f'img/{vendor}/sheets/64.png'] = b'a sheet'
        files[vendor] = folder / f'{vendor}.tgz'
        with tarfile.open(files[vendor], 'w:gz') as archive:
            for name, blob in blobs.items():
                member = tarfile.TarInfo(f'package/{name}')
                member.size = len(blob)
                archive.addfile(member, io.BytesIO(blob))
    return files


def flags_of(packages):
    return [word for vendor, file in packages.items() for word in (f'--{vendor}', file)]


@pytest.fixture
def lay_out(packages, run_script, tmp_path):
    def run(split):
        run_script(make_emoji, *flags_of(packages), '--split', split, '--num-classes', 8, '--output', tmp_path / split)
        return [path.relative_to(tmp_path / split).parts for path in (tmp_path / split).rglob('*.png')]

    return run


def things_of(files, part, group, vendors=VENDORS):
    names = [name.split('_') for split, own, name in files if (split, own) == (part, group)]
    codes = {code.removesuffix('.png') for vendor, code in names if vendor in vendors}
    return {'astronaut' if code in GENDERS else code for code in codes}


def test_vendor_split_has_all_emoji_that_all_vendors_draw(lay_out):
    files = lay_out('vendor')
    # of 5 or 6 things one is held out; person-role has 3 pictures of its sixth thing, clothing one
    for vendor in ('google', 'twitter'):
        seen = Counter(group for split, group, name in files if split != 'test' and name.startswith(vendor))
        assert seen == {**dict.fromkeys(seen, 5), 'person-role': 8, 'clothing': 6}
        assert len(seen) == 8
    assert Counter(group for split, group, _ in files if split == 'test') == seen
    assert {name.split('_')[0] for split, _, name in files if split == 'test'} == {'fluent'}
    assert {group for _, group, _ in files} >= {'sky-weather', 'animal-mammal'}
    assert not [name for _, _, name in files if '1fae8' in name or '1f3fb' in name or '1f1e' in name]


@pytest.mark.parametrize('split', ['vendor', 'concept'])
def test_val_has_a_fifth_of_the_things_that_are_trained_on(lay_out, split):
    files = lay_out(split)
    for group in {group for _, group, _ in files}:
        train, val, test = (things_of(files, part, group) for part in ('train', 'val', 'test'))
        total = 6 if group in ('person-role', 'clothing') else 5
        assert not train & val
        if split == 'vendor':
            assert (len(train), len(val)) == (total - 1, 1)
            assert test == train | val
        else:  # 40 % of 5 or 6 things are 2, and 20 % of the others are 1
            assert (len(train), len(val), len(test)) == (total - 3, 1, 2)
            assert not test & (train | val)
        for part in ('train', 'val'):
            assert things_of(files, part, group, ['google']) == things_of(files, part, group, ['twitter'])
    assert {name.split('_')[0] for part, _, name in files if part != 'test'} == {'google', 'twitter'}


def test_pictures_are_composed_on_white(lay_out, tmp_path):
    files = lay_out('vendor')
    (path,) = [parts for parts in files if parts[2] == f'google_{code_of(1, 2)}.png']
    image = Image.open(tmp_path.joinpath('vendor', *path))
    source = np.asarray(draw('google', 1, 2, 64)).astype(float)
    expected = source[..., :3] * source[..., 3:] / 255 + 255 - source[..., 3:]
    assert image.mode == 'RGB'
    assert np.abs(np.asarray(image) - expected).max() <= 1
    fluent = Image.open(next((tmp_path / 'vendor' / 'test').rglob(f'fluent_{code_of(1, 2)}.png')))
    assert fluent.size == (64, 64)
    assert fluent.getpixel((32, 32)) == colour_of('fluent', 1, 2)
    assert fluent.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    'script, extra',
    [
        (make_emoji, ['--split', 'concept', '--num-classes', 8]),
        (make_emoji_scenes, ['--num-scenes', 3, 2, 2]),
    ],
)
def test_a_second_run_gives_the_same_bytes_also_from_folders(packages, run_script, bytes_of, tmp_path, script, extra):
    run_script(script, *flags_of(packages), *extra, '--output', tmp_path / 'a')
    folders = {}
    for vendor, file in packages.items():
        folders[vendor] = tmp_path / vendor
        shutil.unpack_archive(file, folders[vendor], 'gztar')
    folders['google'] /= 'package'
    run_script(script, *flags_of(folders), *extra, '--output', tmp_path / 'b')
    assert bytes_of(tmp_path / 'a') == bytes_of(tmp_path / 'b')


def test_what_is_missing_is_said(packages, run_script, tmp_path, capsys):
    def run(num_classes=8, output=tmp_path / 'new', **changed):
        words = ['--split', 'vendor', '--num-classes', num_classes, '--output', output]
        run_script(make_emoji, *flags_of({**packages, **changed}), *words)

    with pytest.raises(FileNotFoundError, match=r'--fluent as .tgz or unpacked folder, got .*none.*npm pack'):
        run(fluent=tmp_path / 'none.tgz')
    with pytest.raises(ValueError, match=r'No pictures img/google/64/\*.png in .*twitter.tgz.*package of google'):
        run(google=packages['twitter'])
    with pytest.raises(ValueError, match=r'--num-classes in \[2, 8\].*got 32'):
        run(num_classes=32)
    assert not (tmp_path / 'new').exists()
    (tmp_path / 'file').write_text('')
    with pytest.raises(FileExistsError, match='has files. Remove it'):
        run(output=tmp_path)
    with pytest.raises(SystemExit):
        run_script(make_emoji, '--google', packages['google'], '--split', 'vendor', '--output', tmp_path / 'new')
    assert '--twitter, --fluent' in capsys.readouterr().err


def test_pasting_composes_and_masks_as_loops_do():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (5, 5, 4), dtype=np.uint8)
    image[0, :, 3] = (0, 25, 26, 229, 230)  # both sides of 10 and 90 %
    scene = generator.uniform(0, 255, (9, 8, 3)).astype(np.float32)
    mask = np.full((9, 8), 7, np.uint8)
    expected, classes = scene.astype(float), mask.copy()
    for row in range(5):
        for column in range(5):
            *colour, alpha = (int(value) for value in image[row, column])
            at = (row + 3, column + 1)
            for channel in range(3):
                expected[at][channel] = (colour[channel] * alpha + expected[at][channel] * (255 - alpha)) / 255
            if alpha / 255 > 0.9:
                classes[at] = 4
            elif alpha / 255 > 0.1:
                classes[at] = 255
    make_emoji_scenes.paste(scene, mask, Image.fromarray(image), 4, top=3, left=1)
    np.testing.assert_allclose(scene, expected, atol=1e-3)
    np.testing.assert_array_equal(mask, classes)


def test_scenes_show_the_vendors_of_their_split_where_the_mask_says(packages, run_script, tmp_path):
    words = ['--num-scenes', 24, 12, 12, '--output', tmp_path]
    run_script(make_emoji_scenes, *flags_of(packages), *words)
    colours = {}
    for vendor in VENDORS:
        for label in range(8):
            for number in range(6):
                colours[colour_of(vendor, label, number)] = (vendor, label, number)
    shown = {}
    for split, count in (('train', 24), ('val', 12), ('test', 12)):
        data = open_dataset('', str(tmp_path), split)
        assert len(data) == count
        assert data.class_names[:2] == ['background', 'animal-mammal']
        shown[split] = set()
        for index in range(count):
            image, mask = (np.asarray(part) for part in data.source.load(index))
            assert image.shape == (96, 96, 3)
            assert (mask == 255).any()
            for value in set(np.unique(mask)) - {0, 255}:
                pixels = image[mask == value]
                if len(pixels) < 60:  # little else than edges of what is covered
                    continue
                colour = Counter(map(tuple, pixels.tolist())).most_common(1)[0][0]
                vendor, label, number = colours[colour]
                assert label == value - 1
                shown[split].add((vendor, label, number))
    vendors = {split: {vendor for vendor, _, _ in members} for split, members in shown.items()}
    assert vendors == {'train': {'google', 'twitter'}, 'val': {'google', 'twitter'}, 'test': {'fluent'}}
    seen = {split: {(label, number) for _, label, number in members} for split, members in shown.items()}
    assert not seen['train'] & seen['val']


def test_a_class_of_the_scenes_without_pictures_is_an_error(packages, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(make_emoji_scenes, 'SUBGROUPS', ('clothing', 'hotel'))
    with pytest.raises(ValueError, match='at least 2 things of each class, got fewer of hotel'):
        run_script(make_emoji_scenes, *flags_of(packages), '--output', tmp_path / 'new')


def test_a_thing_is_the_same_for_all_genders():
    assert {emoji_packages.get_thing(code) for code in GENDERS} == {'1f9d1-200d-1f680'}
    runners = ('1f3c3', '1f3c3-200d-2640', '1f3c3-200d-2642')
    assert {emoji_packages.get_thing(code) for code in runners} == {'1f3c3'}
    assert emoji_packages.get_thing('1f431') == '1f431'
