"""Images out of a safetensors file"""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_coretune.data.safetensors_reader import ReaderSafetensors


def test_the_reader_hands_over_the_pixels_it_was_given(tiny):
    from safetensors.torch import load_file

    reader = ReaderSafetensors(str(tiny), 'train')
    file, label = reader[5]
    expected = load_file(tiny)
    assert torch.equal(torch.tensor(list(Image.open(file).tobytes())), expected['train.image'][5].flatten().long())
    assert label == expected['train.label'][5]
    assert reader.class_to_idx == {'red': 0, 'green': 1, 'blue': 2}


def test_grey_images_become_pgm(tmp_path):
    image = torch.arange(2 * 3 * 5, dtype=torch.uint8).reshape(2, 3, 5)
    save_file({'a.image': image, 'a.label': torch.tensor([0, 1])}, tmp_path / 'grey.safetensors')
    opened = Image.open(ReaderSafetensors(str(tmp_path / 'grey.safetensors'), 'a')[1][0])
    assert (opened.mode, opened.size) == ('L', (5, 3))
    assert list(opened.tobytes()) == image[1].flatten().tolist()


@pytest.mark.parametrize(
    'tensors, message',
    [
        ({'train.image': torch.zeros(2, 4, 4), 'train.label': torch.zeros(2).long()}, 'as uint8'),
        ({'train.image': torch.zeros(2, 4, 4).byte(), 'train.label': torch.zeros(2)}, 'as integers'),
        ({'train.image': torch.zeros(2, 4, 4).byte(), 'train.label': torch.zeros(3).long()}, r'integers \(2,\)'),
        ({'test.image': torch.zeros(2, 4, 4).byte(), 'test.label': torch.zeros(2).long()}, "has the splits .'test'."),
    ],
    ids=['float-images', 'float-labels', 'other-length', 'other-split'],
)
def test_a_safetensors_file_of_something_else_is_an_error(tmp_path, tensors, message):
    save_file(tensors, tmp_path / 'data.safetensors')
    with pytest.raises(ValueError, match=message):
        ReaderSafetensors(str(tmp_path / 'data.safetensors'), 'train')
