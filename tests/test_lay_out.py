"""Data sets of torchvision as folders of classes"""

import pytest
from lay_out import main
from PIL import Image


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


def write_dtd(root):
    """Two classes of three images, one image for each split."""
    folder = root / 'dtd' / 'dtd'
    (folder / 'labels').mkdir(parents=True)
    for number, split in enumerate(('train', 'val', 'test')):
        names = [f'{label}/{label}_000{number}.jpg' for label in ('banded', 'zigzagged')]
        for name in names:
            (folder / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4), (80 * number, 0, 0)).save(folder / 'images' / name)
        (folder / 'labels' / f'{split}1.txt').write_text('\n'.join(names))
    return folder / 'images'


def test_training_and_validation_images_are_trained_on(tmp_path, capsys):
    images = write_dtd(tmp_path)
    output = tmp_path / 'out'
    main(['dtd', str(output), '--root', str(tmp_path)])
    assert files_of(output) == {
        *('train/000_banded/banded_0000.jpg', 'train/000_banded/banded_0001.jpg'),
        *('train/001_zigzagged/zigzagged_0000.jpg', 'train/001_zigzagged/zigzagged_0001.jpg'),
        *('test/000_banded/banded_0002.jpg', 'test/001_zigzagged/zigzagged_0002.jpg'),
    }
    copied = output / 'test' / '001_zigzagged' / 'zigzagged_0002.jpg'
    assert copied.read_bytes() == (images / 'zigzagged' / 'zigzagged_0002.jpg').read_bytes()
    assert capsys.readouterr().out == f'4 images in {output}/train, 2 images in {output}/test\n'
    with pytest.raises(SystemExit, match='Expected no folder'):
        main(['dtd', str(output), '--root', str(tmp_path)])


def test_names_of_classes_make_folders(tmp_path):
    data = tmp_path / 'fgvc-aircraft-2013b' / 'data'
    (data / 'images').mkdir(parents=True)
    (data / 'variants.txt').write_text('F/A-18\nCessna 172\n')
    for number, split in enumerate(('trainval', 'test')):
        (data / f'images_variant_{split}.txt').write_text(f'{number}0 F/A-18\n{number}1 Cessna 172\n')
        for label in range(2):
            (data / 'images' / f'{number}{label}.jpg').write_bytes(b'')
    main(['aircraft', str(tmp_path / 'out'), '--root', str(tmp_path)])
    assert files_of(tmp_path / 'out') == {
        *('train/000_F_A_18/00.jpg', 'train/001_Cessna_172/01.jpg'),
        *('test/000_F_A_18/10.jpg', 'test/001_Cessna_172/11.jpg'),
    }


def test_thirty_images_of_a_class_of_caltech101_are_trained_on(tmp_path):
    folder = tmp_path / 'caltech101' / '101_ObjectCategories'
    counts = {'ant': 33, 'bass': 31, 'BACKGROUND_Google': 5}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f'image_{number:04d}.jpg').write_bytes(b'')
    splits = []
    for output in (tmp_path / 'a', tmp_path / 'b'):
        main(['caltech101', str(output), '--root', str(tmp_path)])
        splits.append(files_of(output))
    assert splits[0] == splits[1]
    found = {key: [n for n in splits[0] if n.startswith(f'{key}/')] for key in ('train/ant', 'test/ant', 'train/bass')}
    assert {key: len(names) for key, names in found.items()} == {'train/ant': 30, 'test/ant': 3, 'train/bass': 30}
    assert len(splits[0]) == 33 + 31
    assert sorted(found['test/ant']) != [f'test/ant/image_{n:04d}.jpg' for n in (30, 31, 32)]  # not the last ones


def test_missing_files_are_an_error_that_says_where(tmp_path):
    with pytest.raises(SystemExit, match=f"files of dtd in '{tmp_path}'.*download"):
        main(['dtd', str(tmp_path / 'out'), '--root', str(tmp_path)])
    with pytest.raises(SystemExit, match='files of caltech101'):
        main(['caltech101', str(tmp_path / 'out'), '--root', str(tmp_path)])
    assert not (tmp_path / 'out').exists()
