"""Images are opened upright, on white, and never by a substitute"""

import errno
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_data import write_folders

from timm_coretune.data.images import (
    LabelledImages,
    UnreadableImageError,
    _warn_of_dark_images,
    convert,
    find_fault,
    is_hidden,
    open_image,
    upright,
)


def quadrants(size=(16, 24)):
    """Four grey levels, so that each of the eight orientations looks different."""
    image = Image.new('RGB', size)
    for index, corner in enumerate([(0, 0), (size[0] // 2, 0), (0, size[1] // 2), (size[0] // 2, size[1] // 2)]):
        image.paste((60 * index + 20,) * 3, (*corner, *size))
    return image


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_is_read_as_pil_shows_it(tmp_path, orientation, ending):
    path = tmp_path / f'a.{ending}'
    quadrants().save(path, exif=exif_of(orientation))
    expected = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
    assert expected.size == ((24, 16) if orientation > 4 else (16, 24))
    image = open_image(path, 'RGB')
    assert image.mode == 'RGB'
    assert np.array_equal(np.array(image), np.array(expected))
    assert np.array_equal(np.array(upright(image)), np.array(expected))  # not turned twice


@pytest.mark.parametrize('exif', [b'Exif\0\0nonsense', b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0'])
def test_exif_that_cannot_be_parsed_turns_nothing(tmp_path, exif):
    quadrants().save(tmp_path / 'a.jpg', exif=exif)
    image = open_image(tmp_path / 'a.jpg', 'RGB')
    assert np.array_equal(np.array(image), np.array(Image.open(tmp_path / 'a.jpg')))


def by_hand(pixels):
    """Colours and transparency (..., 4) on white, in floating point."""
    pixels = np.asarray(pixels, float)
    share = pixels[..., 3:] / 255
    return pixels[..., :3] * share + 255 * (1 - share)


def test_a_transparent_image_is_composed_on_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    pixels[:, :4, 3] = 0
    pixels[:, 6:, 3] = 255
    Image.fromarray(pixels, 'RGBA').save(tmp_path / 'a.png')
    found = np.array(open_image(tmp_path / 'a.png', 'RGB'))
    assert np.abs(found - by_hand(pixels)).max() <= 1
    assert (found[:, :4] == 255).all()
    assert np.array_equal(found[:, 6:], pixels[:, 6:, :3])
    assert np.array_equal(np.array(open_image(tmp_path / 'a.png', 'RGBA')), pixels)  # as asked for
    grey = np.array(open_image(tmp_path / 'a.png', 'L'))
    assert np.array_equal(grey, np.array(Image.fromarray(found).convert('L')))


def test_every_kind_of_transparency_is_seen(tmp_path):
    hidden = []
    palette = Image.new('P', (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for name, image, options in (
        ('palette', palette, {'transparency': 0}),
        ('bytes', palette, {'transparency': b'\x00\xff'}),
        ('colour', palette.convert('RGB'), {'transparency': (10, 20, 30)}),
        ('grey', Image.fromarray(np.array([[7, 90]], np.uint8)), {'transparency': 7}),
        ('LA', Image.fromarray(np.array([[[7, 0], [90, 255]]], np.uint8), 'LA'), {}),
    ):
        image.save(tmp_path / f'{name}.png', **options)
        opened = open_image(tmp_path / f'{name}.png', 'RGB')
        assert opened.getpixel((0, 0)) == (255, 255, 255), name
        hidden.append(opened.getpixel((1, 0)))
    assert hidden == [(200, 100, 50)] * 3 + [(90, 90, 90)] * 2


@pytest.mark.parametrize('mode', ['RGB', 'L', '1', 'P', 'CMYK'])
def test_what_is_not_transparent_is_converted_as_before(mode):
    image = quadrants().convert(mode)
    for target in ('RGB', 'L'):
        assert convert(upright(image), target).tobytes() == image.convert(target).tobytes()


def ramp(kind):
    """A gray image of 16 bits from black to white in a file, and its values in 8 bits."""
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.int32)
    file = io.BytesIO()
    if kind == '.pgm':
        file.write(b'P5 8 8 65535\n' + values.astype('>u2').tobytes())
    elif kind == 'big-endian TIFF':
        Image.fromarray(values.astype('>u2')).save(file, 'TIFF')
    else:
        Image.fromarray(values.astype(np.uint16)).save(file, kind)
    file.seek(0)
    return file, np.array([[value // 256 for value in row] for row in values.tolist()])


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'big-endian TIFF', '.pgm'])
def test_an_image_of_16_bits_is_scaled_not_clipped(kind, mode):
    file, expected = ramp(kind)
    image = np.array(open_image(file, mode))
    assert np.array_equal(image if mode == 'L' else image[..., 2], expected)
    assert (image.min(), image.max()) == (0, 255)


def test_gray_and_colors_of_16_bits_are_scaled_alike(tmp_path):
    # a PNG of three channels of 16 bits, which PIL reads but does not write
    rows = b''.join(b'\0' + np.full((1, 3), value, '>u2').tobytes() for value in (0, 300, 40000, 65535))
    chunks = (b'IHDR', struct.pack('>IIBBBBB', 1, 4, 16, 2, 0, 0, 0)), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
    color = b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data)) for name, data in chunks
    )
    gray = io.BytesIO()
    Image.fromarray(np.array([[0], [300], [40000], [65535]], np.uint16)).save(gray, 'PNG')
    read = [np.array(open_image(file, 'RGB')) for file in (io.BytesIO(color), io.BytesIO(gray.getvalue()))]
    assert np.array_equal(*read)


@pytest.mark.parametrize('values', [[0, 300], [-1, 5], [0.0, 1.0], [0.0, float('nan')]], ids=str)
def test_an_image_of_32_bits_whose_white_is_not_known_is_refused(tmp_path, values):
    kind = np.int32 if isinstance(values[0], int) else np.float32
    Image.fromarray(np.array([values], kind)).save(tmp_path / 'a.tif')
    with pytest.raises(UnreadableImageError, match='a.tif.*it is not known what is white'):
        open_image(tmp_path / 'a.tif', 'RGB')
    with open(tmp_path / 'a.tif', 'rb') as file:
        assert 'not known what is white' in find_fault(file)


def test_an_image_of_32_bits_with_values_of_8_is_read_as_before(tmp_path):
    for kind in (np.int32, np.float32):
        Image.fromarray(np.array([[0, 100, 255]], kind)).save(tmp_path / 'a.tif')
        assert np.array(open_image(tmp_path / 'a.tif', 'L')).tolist() == [[0, 100, 255]]


def test_images_of_16_bits_that_hold_8_are_warned_of(messages):
    _warn_of_dark_images.cache_clear()
    for _ in range(2):
        assert convert(Image.fromarray(np.full((2, 2), 200, np.uint16)), 'L').getpixel((0, 0)) == 0
    (warning,) = messages('WARNING')
    assert 'save them with 8' in warning


def encoded(kind, **options):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'BMP', 'WEBP', 'GIF', 'TIFF'])
@pytest.mark.parametrize('whole', [False, True])
def test_files_that_are_cut_are_found_without_decoding_the_others(kind, whole):
    data = encoded(kind)
    assert find_fault(io.BytesIO(data), whole) is None
    for part in (b'', data[:10], data[: len(data) // 2]):
        assert find_fault(io.BytesIO(part), whole)
    assert 'no kind of image' in find_fault(io.BytesIO(b'<html>404 Not Found</html>'), whole)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_bytes_behind_a_whole_image_are_no_fault(kind):
    # phones write films behind their photos
    assert find_fault(io.BytesIO(encoded(kind) + b'film' * 100)) is None


def test_damage_in_the_middle_is_found_by_reading_all_pixels():
    data = bytearray(encoded('PNG'))
    data[len(data) // 2] ^= 255
    assert find_fault(io.BytesIO(data)) is None
    assert find_fault(io.BytesIO(data), whole=True)


def test_running_out_of_files_is_no_fault_of_an_image(tmp_path):
    class Exhausted(io.BytesIO):
        def read(self, *args):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(OSError, match='open files'):
        find_fault(Exhausted(b'x'))


def test_an_image_that_cannot_be_read_is_an_error_with_its_path(tmp_path):
    data = write_folders(tmp_path / 'data', {'a': 2, 'b': 2})
    broken = data / 'a' / '1.png'
    broken.write_bytes(broken.read_bytes()[:40])
    dataset = LabelledImages(str(data))
    assert [dataset[index][1] for index in (0, 2, 3)] == [0, 1, 1]
    with pytest.raises(UnreadableImageError, match=f'{broken}.*no kind of image.*--check-images pixels'):
        dataset[1]
    broken.unlink()
    with pytest.raises(UnreadableImageError, match=f'{broken}.*No such file'):
        dataset[1]


def test_what_macos_writes_beside_an_image_is_known_by_its_name():
    assert [is_hidden(path) for path in ('a/._x.png', '._x.png', 'a/x.png', '._a/x.png', 'x._y.png')] == [
        True, True, False, False, False,
    ]  # fmt: skip
