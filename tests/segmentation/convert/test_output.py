"""A conversion appears whole or not at all, and destroys nothing that was there"""

import os

import numpy as np
import pytest
from annotations import save_image

from timm_coretune.segmentation.convert import output as output_module
from timm_coretune.segmentation.convert.output import Conversion, Sample, write


def plan(folder, split='', value=1, names=('a', 'b'), stems=('x', 'y'), draw=None):
    """A conversion of images of 4 x 3 pixels whose masks have one value."""
    samples = []
    for stem in stems:
        path = save_image(folder / 'source' / f'{stem}.png', (4, 3))
        samples.append(Sample(stem, '.png', str(path), draw or (lambda: np.full((3, 4), value, np.uint8))))
    return Conversion({split: samples}, list(names), [str(folder / 'source')])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def fail(error):
    def draw():
        raise error

    return draw


@pytest.mark.parametrize('error', [ValueError('broken'), KeyboardInterrupt(), OSError(28, 'No space left on device')])
@pytest.mark.parametrize('present', [False, True], ids=['new', 'replaced'])
def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, error, present):
    target = tmp_path / 'out'
    if present:
        write(plan(tmp_path, 'train'), str(target))
    broken = plan(tmp_path, 'train', 2)
    broken.splits['train'] = [broken.splits['train'][0], broken.splits['train'][1]._replace(draw=fail(error))]
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        write(broken, str(target), overwrite=True)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ['out', 'source'][not present :]


@pytest.mark.parametrize('count', range(1, 5))
def test_what_was_there_is_put_back_if_publishing_fails_half_way(tmp_path, monkeypatch, count):
    target = tmp_path / 'out'
    write(plan(tmp_path), str(target))
    before = contents(tmp_path)
    calls, original = [], os.rename

    def rename(a, b):
        calls.append(a)
        if len(calls) == count:
            raise OSError('broken')
        original(a, b)

    broken = plan(tmp_path, value=0)
    monkeypatch.setattr(output_module.os, 'rename', rename)
    with pytest.raises(OSError, match='broken'):
        write(broken, str(target), overwrite=True)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ['out', 'source']


def test_what_is_there_is_replaced_on_request_only(tmp_path):
    target = tmp_path / 'out'
    write(plan(tmp_path, 'train'), str(target))
    (target / 'notes.md').write_text('mine')
    before = contents(target)
    with pytest.raises(ValueError, match=r'no train in .*--overwrite'):
        write(plan(tmp_path, 'train', 0), str(target))
    assert contents(target) == before
    write(plan(tmp_path, 'train', 0, stems=('x',)), str(target), overwrite=True)
    after = contents(target)
    assert set(after) == set(before) - {'train/images/y.png', 'train/masks/y.png'}
    assert after['train/masks/x.png'] != before['train/masks/x.png']
    assert after['notes.md'] == b'mine'


def test_a_second_split_must_have_the_same_classes(tmp_path):
    target = tmp_path / 'out'
    write(plan(tmp_path, 'train'), str(target))
    write(plan(tmp_path, 'val'), str(target))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match='the classes that .* lists, a, b, got a, c'):
            write(plan(tmp_path, 'test' if not overwrite else 'val', names=('a', 'c')), str(target), overwrite)
    assert sorted(os.listdir(target)) == ['classes.txt', 'train', 'val']
    with pytest.raises(ValueError, match='splits alone'):
        write(plan(tmp_path), str(target))
    write(plan(tmp_path), str(tmp_path / 'whole'))
    with pytest.raises(ValueError, match='splits alone'):
        write(plan(tmp_path, 'val'), str(tmp_path / 'whole'))
    write(plan(tmp_path, names=('c', 'd')), str(tmp_path / 'whole'), overwrite=True)  # the only one
    assert (tmp_path / 'whole' / 'classes.txt').read_text() == 'c\nd\n'


def test_what_is_read_is_not_written_over(tmp_path):
    conversion = plan(tmp_path, 'source')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r'other than .*source., which is read'):
        write(conversion, str(tmp_path), overwrite=True)
    conversion.inputs = [str(tmp_path / 'source' / 'x.png')]
    with pytest.raises(ValueError, match='which is read'):
        write(conversion, str(tmp_path), overwrite=True)
    (tmp_path / 'link').symlink_to(tmp_path)
    with pytest.raises(ValueError, match='which is read'):
        write(conversion, str(tmp_path / 'link'), overwrite=True)
    (tmp_path / 'link').unlink()
    assert contents(tmp_path) == before


def test_two_images_of_one_name_no_images_and_a_file_in_place_of_the_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="both be called 'x'"):
        write(plan(tmp_path, stems=('x', 'x')), str(tmp_path / 'out'))
    with pytest.raises(ValueError, match='found none'):
        write(plan(tmp_path, stems=()), str(tmp_path / 'out'))
    with pytest.raises(ValueError, match='got the file'):
        write(plan(tmp_path), str(tmp_path / 'source' / 'x.png'))
    assert os.listdir(tmp_path) == ['source']


def test_files_are_copied_or_linked_with_the_usual_rights(tmp_path):
    write(plan(tmp_path), str(tmp_path / 'copied'))
    write(plan(tmp_path, stems=('z',)), str(tmp_path / 'linked'), hard_link=True)
    source = tmp_path / 'source'
    assert (tmp_path / 'copied' / 'images' / 'x.png').stat().st_ino != (source / 'x.png').stat().st_ino
    assert (tmp_path / 'linked' / 'images' / 'z.png').stat().st_ino == (source / 'z.png').stat().st_ino
    (tmp_path / 'plain').mkdir()
    (tmp_path / 'plain' / 'file').write_text('')
    for name in ('copied', 'copied/images'):
        assert (tmp_path / name).stat().st_mode == (tmp_path / 'plain').stat().st_mode
    for name in ('classes.txt', 'masks/x.png', 'images/x.png'):
        assert (tmp_path / 'copied' / name).stat().st_mode == (tmp_path / 'plain' / 'file').stat().st_mode


def test_a_link_that_cannot_be_made_is_not_replaced_by_a_copy_silently(tmp_path, monkeypatch):
    def link(*args, **kwargs):
        raise OSError(18, 'Invalid cross-device link')

    monkeypatch.setattr(output_module.os, 'link', link)
    with pytest.raises(ValueError, match='Invalid cross-device link. Leave --hard-link out'):
        write(plan(tmp_path), str(tmp_path / 'out'), hard_link=True)
    assert os.listdir(tmp_path) == ['source']


@pytest.mark.parametrize('split', ['../x', 'a/b', '.hidden', 'masks', 'a b', '-x'])
def test_a_split_is_a_plain_name(split):
    with pytest.raises(ValueError, match='Expected a split such as train'):
        output_module.check_split(split)
    assert output_module.check_split('val_2017-a.b') == 'val_2017-a.b'
