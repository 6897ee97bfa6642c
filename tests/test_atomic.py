"""A file is there whole or not at all, and on the disk before it takes the place of another"""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import timm_coretune
from timm_coretune import atomic


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / 'file.txt'
    atomic.write_text('first\r\n', path)
    atomic.write_text('zweite Ä\n', path)
    assert path.read_bytes() == 'zweite Ä\n'.encode()
    assert os.listdir(tmp_path) == ['file.txt']


def test_nothing_is_written_through_a_link_that_somebody_left(tmp_path, monkeypatch):
    victim, path = tmp_path / 'victim', tmp_path / 'file.txt'
    victim.write_text('mine')
    taken = ['11' * 8, '22' * 8]
    names = iter([*taken, '33' * 8])
    monkeypatch.setattr(atomic.secrets, 'token_hex', lambda _: next(names))
    (tmp_path / 'file.txt.tmp').symlink_to(victim)  # the name that was used before
    (tmp_path / f'file.txt.{taken[0]}.tmp').symlink_to(victim)
    (tmp_path / f'file.txt.{taken[1]}.tmp').symlink_to(tmp_path / 'nowhere')
    path.symlink_to(victim)
    before = set(os.listdir(tmp_path))
    atomic.write_text('text', path)
    assert victim.read_text() == 'mine'
    assert (path.read_text(), path.is_symlink()) == ('text', False)
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize('name', ['x' * 255, 'ä' * 127, '語' * 85], ids=['ascii', 'german', 'chinese'])
def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path, name):
    atomic.write_text('text', tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_file_has_the_rights_of_other_files(tmp_path):
    atomic.write_text('text', tmp_path / 'ours')
    (tmp_path / 'plain').write_text('text')
    assert stat.S_IMODE((tmp_path / 'ours').stat().st_mode) == stat.S_IMODE((tmp_path / 'plain').stat().st_mode)


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone_and_no_other(tmp_path, error):
    path = tmp_path / 'file.txt'
    path.write_text('old')

    def write():
        with atomic.write_whole(path) as temporary:
            Path(temporary).write_text('half')
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['file.txt']


def test_the_file_is_on_the_disk_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    path, events = tmp_path / 'file.txt', []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')))
        fsync(descriptor)

    def noting_replace(source, target):
        events.append('rename')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', noting_fsync)
    monkeypatch.setattr(os, 'replace', noting_replace)
    atomic.write_text('text', path)
    temporary, *rest = events
    assert re.fullmatch(r'file\.txt\.[0-9a-f]{16}\.tmp', temporary)
    assert rest == ['rename', tmp_path.name]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')
    code = (
        'import os, sys\n'
        'from timm_coretune.atomic import write_whole\n'
        'with write_whole(sys.argv[1]) as temporary, open(temporary, "w") as f:\n'
        '    f.write("half"); f.flush(); os.kill(os.getpid(), 9)\n'
    )
    root = str(Path(timm_coretune.__file__).parents[1])
    finished = subprocess.run([sys.executable, '-c', code, str(path)], env={**os.environ, 'PYTHONPATH': root})
    assert finished.returncode == -9
    assert path.read_text() == 'old'


def test_no_other_module_renames_a_file():
    root = Path(timm_coretune.__file__).parent
    found = {p.name for p in root.rglob('*.py') if 'os.replace(' in p.read_text() or 'os.rename(' in p.read_text()}
    assert found == {'atomic.py'}


@pytest.mark.skipif(os.name != 'posix', reason='modes of files are those of POSIX')
def test_a_file_that_was_made_for_its_owner_only_gets_the_mode_of_a_new_file(tmp_path):
    previous = os.umask(0o027)
    try:
        with atomic.write_whole(tmp_path / 'file') as temporary:
            os.unlink(temporary)  # as libraries do that write a file of their own and move it
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(previous)
    assert os.stat(tmp_path / 'file').st_mode & 0o777 == 0o640


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / 'other').write_text('other')
    (tmp_path / 'file.tmp').symlink_to(tmp_path / 'other')
    atomic.write_text('text', tmp_path / 'file')
    assert (tmp_path / 'other').read_text() == 'other'
    assert (tmp_path / 'file').read_text() == 'text'
    assert not (tmp_path / 'file').is_symlink()
