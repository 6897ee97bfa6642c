"""Cityscapes, ADE20K and masks in colours become folders that training reads"""

import numpy as np
import pytest
from annotations import CITYSCAPES_IDS, save_image, save_mask, write_ade20k, write_cityscapes
from PIL import Image
from torchvision.datasets import Cityscapes

from timm_coretune.segmentation.convert.__main__ import main
from timm_coretune.segmentation.data.dataset import open_dataset


def convert(kind, source, *flags):
    output = source.parent / 'out'
    main(['convert', kind, str(source), '--output', str(output), *map(str, flags)])
    return output


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_label_ids_of_cityscapes_become_train_ids(tmp_path, capsys):
    output = convert('cityscapes', write_cityscapes(tmp_path / 'in'))
    assert names_in(output) == ['classes.txt', 'train', 'val']
    assert names_in(output / 'train' / 'images') == ['jena_000000_000019.png', 'ulm_000000_000019.png']
    expected = [CITYSCAPES_IDS.index(value) if value in CITYSCAPES_IDS else 255 for value in range(34)]
    by_torchvision = {kind.id: kind.train_id for kind in Cityscapes.classes}
    assert [min(by_torchvision[value] % 256, 255) for value in range(34)] == expected
    for split, count in (('train', 2), ('val', 1)):
        dataset = open_dataset('', str(output), split)
        assert (len(dataset), dataset.num_classes, dataset.class_names[10:12]) == (count, 19, ['sky', 'person'])
        assert all(mask.tolist() == [expected] for _, mask in dataset)
    assert capsys.readouterr().out.startswith('train: 2 images and masks\nval: 1 images and masks\nclasses: 19')


def test_cityscapes_without_masks_is_refused_or_counted(tmp_path, capsys):
    root = write_cityscapes(tmp_path / 'in')
    (root / 'gtFine' / 'train' / 'ulm' / 'ulm_000000_000019_gtFine_labelIds.png').unlink()
    with pytest.raises(SystemExit):
        convert('cityscapes', root)
    assert 'ulm_000000_000019_gtFine_labelIds.png' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
    convert('cityscapes', root, '--skip-missing')
    assert 'left out: 1 images without a mask' in capsys.readouterr().out
    (root / 'gtFine').rename(root / 'gtCoarse')
    with pytest.raises(SystemExit):
        convert('cityscapes', root, '--overwrite')
    assert 'found no gtFine, but gtCoarse/, leftImg8bit/' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert('cityscapes', root / 'nowhere')
    assert 'does not exist' in capsys.readouterr().err


@pytest.mark.parametrize('with_names', [True, False])
def test_zero_of_ade20k_is_left_out_and_classes_move_down(tmp_path, with_names):
    output = convert('ade20k', write_ade20k(tmp_path / 'in', with_names))
    for split in ('train', 'val'):
        dataset = open_dataset('', str(output), split)
        assert (dataset.num_classes, len(dataset)) == (150, 1)
        assert dataset.class_names[149] == ('name 150, other' if with_names else '150')
        values = np.arange(151).repeat(2).reshape(2, 151)
        assert np.array_equal(dataset[0][1], np.where(values == 0, 255, values - 1))


def test_what_is_no_ade20k_is_refused(tmp_path, capsys):
    root = write_ade20k(tmp_path / 'in')

    def refusal():
        with pytest.raises(SystemExit):
            convert('ade20k', root)
        assert not (tmp_path / 'out').exists()
        return capsys.readouterr().err

    mask = root / 'annotations' / 'training' / 'ADE_0.png'
    values = np.array(Image.open(mask))
    values[1, 1] = 151
    save_mask(mask, values)
    assert 'Expected values from 0 to 150' in refusal()
    save_mask(mask, values[:1])
    assert 'Expected an image of 151 x 1 pixels' in refusal()
    mask.unlink()
    assert 'Expected the mask ADE_0.png' in refusal()
    (root / 'objectInfo150.txt').write_text('Idx\tName\n1\twall\n')
    assert 'a row for each of the classes 1 to 150' in refusal()
    (root / 'annotations').rename(root / 'elsewhere')
    assert 'found no annotations, but elsewhere/, images/' in refusal()


def test_colours_become_classes(tmp_path):
    colors = np.array([[[0, 0, 0], [128, 0, 0], [9, 9, 9]], [[128, 0, 0], [0, 0, 0], [0, 0, 0]]], np.uint8)
    save_image(tmp_path / 'in' / 'val' / 'images' / 'a.jpg', (3, 2))
    save_mask(tmp_path / 'in' / 'val' / 'masks' / 'a_color.png', colors)
    (tmp_path / 'colors.txt').write_text('128 0 0 road\n0 0 0 ground\n#090909 ignore\n')
    output = convert('colors', tmp_path / 'in', '--colors', tmp_path / 'colors.txt', '--split', 'val')
    dataset = open_dataset('', str(output), 'val')
    assert dataset.class_names == ['road', 'ground']
    assert dataset[0][1].tolist() == [[1, 0, 255], [0, 1, 1]]


def test_a_colour_that_is_not_listed_is_refused(tmp_path, capsys):
    save_image(tmp_path / 'in' / 'images' / 'a.jpg', (1, 1))
    save_mask(tmp_path / 'in' / 'masks' / 'a.png', [[[1, 2, 3]]])
    (tmp_path / 'colors.txt').write_text('128 0 0 road\n')
    with pytest.raises(SystemExit):
        convert('colors', tmp_path / 'in', '--colors', tmp_path / 'colors.txt')
    assert 'only colours that --colors' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
