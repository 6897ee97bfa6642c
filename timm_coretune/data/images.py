"""Opens images: upright, on one background, and without a substitute for one that cannot be read

All code of this package that opens an image does it here, so that training, validation and prediction see the same.

- An image of 16 bits is scaled to 8, where PIL would make everything above 255 white.
- The orientation that a camera writes into a photo (EXIF) is applied: the image is as a viewer shows it.
- A transparent image is composed on white. The colours below full transparency, which nobody sees, are not used.
- Only regular files are opened: a named pipe would be waited for without end, and devices have no end.
- An image of very many pixels is refused, as PIL does: a small file can ask for all memory. CORETUNE_MAX_PIXELS in the
  environment is the number of pixels up to which images are read. Processes that load data inherit it.
"""

import errno
import functools
import logging
import os
import re
import stat
from typing import IO, Any, Callable, Dict, Iterator, Optional, Union

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

_logger = logging.getLogger(__name__)

BACKGROUND = (255, 255, 255, 255)  # white, as pages on which transparent images are usually shown
# Endings of the files that are read as images, in lower case. PIL reads them without another library or program.
IMAGE_ENDINGS = (
    *('.png', '.jpg', '.jpeg', '.jfif', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'),
)  # fmt: skip
# endings of images that are not read, beside those that PIL knows
_OTHER_IMAGES = ('.heic', '.heif', '.jxl', '.dcm', '.npy', '.svg', '.raw', '.cr2', '.nef', '.arw', '.dng', '.exr')
_WIDE_MODES = ('I', 'I;16', 'I;16L', 'I;16B', 'I;16N', 'F')  # more than 8 bits in a pixel
_BITS_PER_SAMPLE = 258  # tag of TIFF
_ORIENTATION = 0x0112  # tag of EXIF
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82'}  # last bytes of a whole file
REPAIR = (
    'Replace or remove it. With --check-images pixels all images are read before the run starts, and those that cannot '
    'be read are left out of the training; with --skip-unreadable of the validation too.'
)


MAX_PIXELS_VARIABLE = 'CORETUNE_MAX_PIXELS'
_KINDS: Dict[str, Callable[[int], bool]] = {
    'a folder': stat.S_ISDIR,
    'a named pipe': stat.S_ISFIFO,
    'a socket': stat.S_ISSOCK,
    'a device': lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


class UnreadableImageError(ValueError):
    """An image cannot be read. The message names it."""


def set_limit(text: str) -> None:
    """Let PIL read images of at least so many pixels, without a warning. An empty text changes nothing."""
    if not text:
        return
    if not re.fullmatch('[1-9][0-9]{0,17}', text):
        raise ValueError(f'Expected a number of pixels in the variable {MAX_PIXELS_VARIABLE}, got {text!r}.')
    Image.MAX_IMAGE_PIXELS = int(text)


set_limit(os.environ.get(MAX_PIXELS_VARIABLE, ''))


def kind_of_file(path: Union[str, os.PathLike]) -> str:
    """What is at a path that is no regular file, such as 'a named pipe'. Empty for a file, and if nothing is there."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # that of opening it tells more
        return 'a symbolic link to nothing' if os.path.islink(path) else ''
    if stat.S_ISREG(mode):
        return ''
    return next((kind for kind, holds in _KINDS.items() if holds(mode)), 'no regular file')


def check_regular(path: Union[str, os.PathLike]) -> None:
    """Refuse what is no regular file.

    Raises:
        UnreadableImageError: The path leads to something else, such as a named pipe.
    """
    kind = kind_of_file(path)
    if kind:
        raise UnreadableImageError(f'it is {kind}')


def open_file(path: Union[str, os.PathLike]) -> Image.Image:
    """Open an image in a regular file. PIL reads its pixels later."""
    check_regular(path)
    return Image.open(path)


def open_in_reader(reader: Any, index: int) -> Any:
    """File and label of an image from a timm reader, which opens regular files only."""
    if isinstance(reader, ReaderImageFolder):
        check_regular(reader.filename(index, absolute=True))
    return reader[index]


def is_hidden(path: str) -> bool:
    """Whether a file is one of those that macOS writes beside images, such as ._x.png beside x.png. It is no image."""
    return os.path.basename(path).startswith('._')


def is_other_image(ending: str) -> bool:
    """Whether files with this ending are likely images, although they are not read as such."""
    Image.init()
    return ending not in IMAGE_ENDINGS and (ending in _OTHER_IMAGES or ending in Image.EXTENSION)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says. The result has no orientation: turning it again changes nothing."""
    image.load()  # PNG may have its EXIF after the pixels, and TIFF files are turned by PIL when they are loaded
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF that cannot be parsed raises many kinds of errors; viewers show such an image as it is
        return image
    method = _TRANSPOSE.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    for key in ('exif', 'Raw profile type exif', 'XML:com.adobe.xmp', 'xmp'):  # all places where PIL looks for it
        turned.info.pop(key, None)
    return turned


def narrow(image: Image.Image) -> Image.Image:
    """Scale an image of 16 bits to 8: its upper byte counts, as PIL and libpng do it for colours. Others stay.

    Raises:
        ValueError: The image has 32 bits in a pixel and values that are not in the range of 8 bits. What is white in it
            is not known.
    """
    if image.mode not in _WIDE_MODES:
        return image
    values = np.asarray(image)
    if image.mode not in ('I', 'F') or image.format in ('PNG', 'PPM'):  # which have no more than 16 bits
        bits = getattr(image, 'tag_v2', {}).get(_BITS_PER_SAMPLE, (16,))[0]  # 12 in some TIFF files
        if values.size and 0 < values.max() <= 255:
            _warn_of_dark_images()
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not (low >= 0 and high <= 255) or (image.mode == 'F' and 0 < high <= 1):
        raise ValueError(
            f'its pixels have 32 bits and values from {low:g} to {high:g}, of which it is not known what is white. '
            'Save it with 8 or 16 bits in a pixel'
        )
    return image


@functools.lru_cache(maxsize=1)  # once in a process
def _warn_of_dark_images() -> None:
    _logger.warning(
        'An image of 16 bits has no value above 255, of 65535, and so is black. If such images hold values of 8 bits, '
        'save them with 8.'
    )


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a PIL mode. A transparent one is composed on white, unless the mode has transparency too."""
    if mode not in _WIDE_MODES:
        image = narrow(image)
    if mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
        return image.convert(mode)
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or (
        'transparency' in image.info and image.mode in ('1', 'L', 'P', 'RGB')
    ):
        canvas = Image.new('RGBA', image.size, BACKGROUND)
        canvas.alpha_composite(image.convert('RGBA'))
        image = canvas.convert('RGB')
    return image.convert(mode)


def open_image(file: Any, mode: str) -> Image.Image:
    """Read an image from a path or an open file: upright, on white, in a PIL mode.

    Raises:
        UnreadableImageError: The image cannot be read.
    """
    try:
        with open_file(file) if isinstance(file, (str, os.PathLike)) else Image.open(file) as image:
            return convert(upright(image), mode)
    except Exception as e:
        raise UnreadableImageError(f'Expected an image that can be read in {file!r}: {reason_of(e)}.') from e


def find_fault(file: IO[bytes], whole: bool = False) -> Optional[str]:
    """Why an image cannot be read, or None if it can.

    Args:
        file: An open file of an image.
        whole: Decode all pixels. Otherwise only the header and the end of a JPEG or PNG are read, and the pixels if
            the end is not as expected: this finds files that are empty, cut or no images, and costs little.
    """
    try:
        with Image.open(file) as image:
            if not whole and image.format in _ENDS:
                end = _ENDS[image.format]
                position = file.tell()
                file.seek(-len(end), os.SEEK_END)
                if file.read(len(end)) == end:
                    return None
                file.seek(position)
            narrow(image)
            image.load()
    except Exception as e:
        return reason_of(e)
    return None


def reason_of(error: Exception) -> str:
    """Describe why PIL could not read an image. Its decoders raise errors of many kinds, not OSError alone.

    An error that says nothing about the image is raised again, such as too many open files.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return 'no kind of image that PIL knows'
    if isinstance(error, Image.DecompressionBombError):
        pixels, *_ = [*re.findall(r'\d+', str(error)), 'N']
        return (
            f'it has {pixels} pixels, so many that PIL suspects an attack on the memory. If you trust the file, set '
            f'{MAX_PIXELS_VARIABLE}={pixels} in the environment, or PIL.Image.MAX_IMAGE_PIXELS in Python'
        )
    return f'{error}' or type(error).__name__


class LabelledImages(ImageDataset):
    """timm's data set of images, which raises an error for an image that it cannot read.

    timm's own takes the next image in its place, with the label of the next, so that some images count twice.

    Args:
        root: Folder or file with the images.
        reader: A timm reader, which opens the file of an image and tells its label.
        input_img_mode: PIL mode of the images.
    """

    def __getitem__(self, index: int) -> Any:
        try:
            file, target = open_in_reader(self.reader, index)
            with file:
                image = open_image(file, self.input_img_mode)
        except (OSError, UnreadableImageError) as e:  # the file cannot be opened, or is no image
            reason = reason_of(e.__cause__ if isinstance(e.__cause__, Exception) else e)
            raise UnreadableImageError(
                f'Expected an image that can be read in {name_of(self.reader, index)!r}: {reason}. {REPAIR}'
            ) from e
        image = image if self.transform is None else self.transform(image)
        if target is None:
            return image, -1
        return image, target if self.target_transform is None else self.target_transform(target)


class ImageStream(IterableImageDataset):
    """timm's stream of images with labels, which are upright and on white.

    Args:
        reader: A timm reader that hands over images of PIL.
        img_mode: PIL mode of the images.
    """

    def __init__(self, reader: Any, img_mode: str):
        super().__init__(None, reader=reader)
        reader.input_img_mode = None  # otherwise the reader drops the transparency
        self.img_mode = img_mode

    def __iter__(self) -> Iterator[Any]:
        images = iter(self.reader)
        while True:
            try:
                image, target = next(images)
                image = convert(upright(image), self.img_mode)
            except StopIteration:
                return
            except Image.DecompressionBombError as e:
                where = getattr(self.reader, 'root', None) or getattr(self.reader, 'name', None) or 'the stream'
                raise UnreadableImageError(
                    f'Expected images that can be read in {str(where)!r}, got one that cannot: {reason_of(e)}.'
                ) from e
            image = image if self.transform is None else self.transform(image)
            yield image, target if self.target_transform is None else self.target_transform(target)


def name_of(reader: Any, index: int) -> str:
    """Name of an image in messages: its path if it has one, else its place in the data set."""
    name = reader.filename(index, absolute=True)
    root = str(getattr(reader, 'root', None) or '')
    if name is None:
        return f'{root}[{index}]'
    return name if os.path.isabs(name) or name.startswith(root) or not root else os.path.join(root, name)
